"""Attach a LoRA adapter by PEFT, and prove that it is trained and saved."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from transformers import PreTrainedModel

from nybble.errors import ModelError, TrainingError
from nybble.model.adapter_config import CONFIG, read_adapter_config
from nybble.model.adapter_files import read_tensors
from nybble.model.weights import LOADING_FAULTS, by, reason, some
from nybble.recipe import LoraOptions

COPY = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")  # of the base, as PEFT saves them beside an adapter
RANK_AXES = {"A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1}
ADDED_TOKENS = (
    "its base must have these tokens too: resize it as before that training (tokenizer of the adapter, "
    "model.resize_token_embeddings(len(tokenizer))), save it, and name it with --base PATH"
)
# PEFT's orthogonal start fails on 4-bit layers (0.21), PiSSA and LoftQ alter the base: none of these is offered.
INIT: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}


def attach_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """A new adapter on a frozen base; its parameters are float32, the base's stay as they are.

    Raises:
        ModelError: a target that no linear layer carries, with the names that exist.
    """
    targets: str | list[str] = options.targets
    if not isinstance(targets, str):
        _check_targets(model, targets)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=INIT[options.init],
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted: PeftModel = get_peft_model(model, config)
    return adapted


def resume_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """An adapter that is there already, to be trained on.

    Raises:
        ModelError: no adapter there, a damaged one, or one that does not fit this base.
    """
    return _attach_stored(model, path, trainable=True)


def load_adapter(model: PreTrainedModel, path: str | pathlib.Path) -> PeftModel:
    """An adapter to answer with; its parameters are frozen.

    Raises:
        ModelError: as `resume_adapter`.
    """
    return _attach_stored(model, path, trainable=False)


def add_adapter(model: PeftModel, path: str | pathlib.Path, name: str) -> None:
    """Another adapter on the same base, chosen by `set_adapter(name)`.

    Raises:
        ModelError: as `resume_adapter`, or it would change the base for the others.
    """
    config, file, tensors = _read_stored(model.get_base_model(), path)
    with _built(config, trainable=False), _explained(config, path):
        model.add_adapter(name, config, low_cpu_mem_usage=not config.use_dora)
    changed = _fill(model, name, file, tensors)
    if changed:
        raise ModelError(
            f"the adapter brings its own {some(changed)}, and adapters that share a base in memory share its embeddings",
            where=str(file),
            fix="load it alone: one server per such adapter, each on its own --port",
        )
    model.eval()


def check_gradients(model: torch.nn.Module, *, first: bool, scaled: bool = False) -> None:
    """After a backward pass every adapter tensor has a finite gradient.

    Args:
        first: at the first step B is zero and so is A's gradient; B's must not be.
        scaled: float16 with loss scaling, where a step that overflows is skipped by the scaler.

    Raises:
        TrainingError: naming the first tensor without one.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in named if parameter.grad is None]
    if not named or missing:
        raise TrainingError(
            f"{len(missing)} of {len(named)} adapter tensors got no gradient, the first {missing[:1]}",
            fix="check lora.targets; report this with RUN/start.json",
        )
    norms = torch.stack([parameter.grad.float().norm() for _, parameter in named]).tolist()  # type: ignore[union-attr]
    if not all(map(math.isfinite, norms)) and not scaled:
        raise TrainingError(
            "a gradient is not finite although the loss is; this step did not change the adapter",
            fix="a lower train.learning_rate, or model.dtype=bfloat16",
        )
    dead = [
        name
        for (name, _), norm in zip(named, norms, strict=True)
        if norm == 0 and ("lora_B" in name or not first) and "magnitude" not in name
    ]
    if len(dead) == len(norms) or (first and dead):
        raise TrainingError(
            f"{len(dead)} of {len(named)} adapter tensors have a zero gradient, the first {dead[:1]}",
            fix="check lora.targets and that the data has answers to train on",
        )


def check_saved(model: PeftModel, folder: pathlib.Path, *, learnt: bool = True) -> None:
    """Read a saved adapter back and compare it with the one in memory.

    Args:
        learnt: whether anything can have been learnt yet; with a warm-up the first step's learning rate is zero.

    Raises:
        TrainingError: a tensor is missing, differs, or every B is zero (nothing was learnt, or it was not saved).
    """
    saved = load_peft_weights(str(folder), device="cpu")
    live = get_peft_model_state_dict(model)
    if saved.keys() != live.keys():
        odd = sorted(saved.keys() ^ live.keys())
        raise TrainingError(
            f"the saved adapter's tensors are not those of the trained one: {odd[:2]}", where=str(folder)
        )
    for name, parameter in live.items():
        if not torch.equal(saved[name], parameter.detach().cpu()):
            raise TrainingError(f"the saved adapter differs from the trained one in {name}", where=str(folder))
    updates = [tensor for name, tensor in saved.items() if "lora_B" in name]
    if learnt and updates and not any(tensor.any() for tensor in updates):
        raise TrainingError(
            "every B of the saved adapter is zero: nothing was learnt",
            where=str(folder),
            fix="a higher train.learning_rate, or a shorter train.warmup",
        )


def targets_of(model: PeftModel) -> list[str]:
    """Names of the layers that carry the adapter, without their places; PEFT's configuration may have a regular expression."""
    return sorted({name.rpartition(".")[2] for name in model.targeted_module_names})


@dataclass(frozen=True)
class Updates:
    """What an adapter in memory changes.

    Attributes:
        count: modules with an A and a B of their own.
        zero: of these, those whose A or B is zero, or whose scaling is: they change nothing.
        negative: of these, those that are subtracted: their alpha is negative.
        whole: what is trained beside them: names of modules, or embeddings of single tokens.
    """

    count: int
    zero: int
    negative: int = 0
    whole: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the model answers as its base does."""
        return self.zero == self.count and not self.whole

    @property
    def is_odd(self) -> bool:
        """Whether it is not as training leaves an adapter."""
        return bool(self.zero or self.negative)

    def __str__(self) -> str:
        plural = "s" * (self.count != 1)
        if self.zero == 0:
            text = f"{self.count:,} update{plural}, {'all ' * (self.count > 1)}non-zero"
        elif self.zero < self.count:
            text = f"{self.zero:,} of {self.count:,} updates are zero"
        else:
            text = f"all {self.count:,} updates are zero" if self.count > 1 else "its one update is zero"
            text += ": it answers as the base does" * self.changes_nothing
        text += f"; {self.negative:,} subtracted, as alpha is negative" if self.negative else ""
        return text + (f"; {', '.join(self.whole)} trained too" if self.whole else "")


def updates_of(model: PeftModel, name: str = "default") -> Updates:
    """Count the updates of an adapter: a pass over its numbers, on their device."""
    zero, scalings = 0, []
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            scalings.append(module.scaling[name])
            zero += scalings[-1] == 0 or not _changes(module, name)
    config = model.peft_config[name]
    tokens = ["embeddings of single tokens"] if config.trainable_token_indices else []
    return Updates(len(scalings), zero, sum(s < 0 for s in scalings), (*sorted(config.modules_to_save or []), *tokens))


def _changes(layer: LoraLayer, name: str) -> bool:
    """Whether B A, or B's bias, is not zero for sure."""
    if name in layer.lora_embedding_A:
        parts = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        return all(bool(part.any()) for part in parts)
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None and b.bias.any():
        return True
    return bool(a.weight.any()) and bool(b.weight.any())


def is_untrained(model: PeftModel) -> bool:
    """Whether every update of the adapter is zero, as at the start: it then changes nothing."""
    updates = updates_of(model)
    return updates.count > 0 and updates.zero == updates.count


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    unknown = [t for t in targets if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown:
        raise ModelError(
            f"lora.targets: the model has no linear layer named {', '.join(unknown)}",
            fix=f"its linear layers are {', '.join(leaves)}; all-linear takes all but lm_head",
        )


def _attach_stored(model: PreTrainedModel, path: str | pathlib.Path, *, trainable: bool) -> PeftModel:
    config, file, tensors = _read_stored(model, path)
    with _built(config, trainable=trainable), _explained(config, path):
        adapted: PeftModel = PeftModelForCausalLM(model, config, low_cpu_mem_usage=not config.use_dora)
    _fill(adapted, "default", file, tensors)
    return adapted if trainable else adapted.eval()


def _read_stored(
    model: PreTrainedModel, path: str | pathlib.Path
) -> tuple[LoraConfig, pathlib.Path, dict[str, torch.Tensor]]:
    """Configuration, file and tensors; refused where rows of the embedding were trained that this base does not have."""
    config = read_adapter_config(path)
    rows = model.get_input_embeddings().weight.shape[0]
    trained = config.trainable_token_indices or []
    ids = itertools.chain.from_iterable(trained.values()) if isinstance(trained, dict) else trained
    highest = max(ids, default=-1)
    if highest >= rows:
        raise ModelError(
            f"the adapter was trained on token {highest}, and the base has embeddings for ids 0 to {rows - 1} only: "
            "tokens were added to its base before training",
            where=str(path),
            fix=ADDED_TOKENS,
        )
    file, tensors = read_tensors(pathlib.Path(path))
    claimed = max([config.r, *(config.rank_pattern or {}).values()])
    if claimed > max(max(tensor.shape, default=1) for tensor in tensors.values()):  # PEFT would make room for it
        raise ModelError(
            f"{CONFIG} says rank {claimed:,}, and no tensor in {file.name} is so large",
            where=str(file),
            fix="copy the adapter again, both its files",
        )
    return config, file, tensors


@contextlib.contextmanager
def _built(config: LoraConfig, *, trainable: bool) -> Iterator[None]:
    """An adapter is built without its numbers, which the file has: how they would start need not be computed.

    DoRA alone is built with them: PEFT 0.21 dequantises the base for it, and would lose an 8-bit one.
    """
    start, config.init_lora_weights, config.inference_mode = config.init_lora_weights, True, not trainable
    try:
        yield
    finally:
        config.init_lora_weights = start


@contextlib.contextmanager
def _explained(config: LoraConfig, path: str | pathlib.Path) -> Iterator[None]:
    """What PEFT finds wrong with a configuration on this base, as a ModelError."""
    try:
        yield
    except LOADING_FAULTS as error:
        raise ModelError(f"the adapter does not fit this base: {reason(error)}", str(path), _trained_on(config)) from error


def _fill(model: PeftModel, name: str, file: pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Put an adapter's tensors into their places, each into its own and none left over.

    Returns:
        Embeddings and heads of the base that the file holds too, and that were others.

    Raises:
        ModelError: naming tensors that are missing, have no place, or are of another shape.
    """
    live = model.state_dict()
    places = get_peft_model_state_dict(model, live, name, save_embedding_layers=False)
    copies = {key: live[key] for key in tensors if key not in places and key in live and COPY.search(key)}
    _check_places(tensors, places, copies, model.peft_config[name], file)
    names = {id(tensor): key for key, tensor in live.items()}  # PEFT leaves out the adapter's name in a file
    built = {}
    for key, place in places.items():
        if place.is_meta:  # a copy in any case, since the file's own pages change with the file
            built[names[id(place)]] = tensors[key].to(model.device, place.dtype, copy=True)
        else:  # what PEFT copied from the base, and may have tied
            place.copy_(tensors[key])
    model.load_state_dict(built, strict=False, assign=True)
    left = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, left
    changed = [key for key, place in copies.items() if not torch.equal(tensors[key].to(place), place)]
    for key in changed:
        copies[key].copy_(tensors[key])
    return [_plain(key) for key in changed]


def _check_places(
    tensors: Mapping[str, torch.Tensor],
    places: Mapping[str, torch.Tensor],
    copies: Mapping[str, torch.Tensor],
    config: LoraConfig,
    file: pathlib.Path,
) -> None:
    biases = [key for key in tensors if key in places and key.endswith(".bias") and ".lora_B." not in key]
    if biases:
        raise ModelError(
            f"the adapter changes {_plain(biases[0])} of the base itself (bias={config.bias}): switched off, it would not "
            "leave the base as it was",
            where=str(file),
            fix="merge it with PEFT, and use the merged model as a base",
        )
    sizes = {
        key: (tuple(tensor.shape), tuple(place.shape))
        for key, tensor in tensors.items()
        if (place := places.get(key, copies.get(key))) is not None and place.shape != tensor.shape
    }
    if sizes:
        raise _misfit(config, file, sizes)
    missing = [_plain(key) for key in places if key not in tensors]
    foreign = [_plain(key) for key in tensors if key not in places and key not in copies]
    if not missing and not foreign:
        return
    faults = [f"lacks {some(missing)}"] if missing else []
    faults += [f"holds {some(foreign)}, for which this base with this {CONFIG} has no place"] if foreign else []
    raise ModelError(
        f"{file.name} {', and '.join(faults)}",
        where=str(file),
        fix=f"copy the adapter again, both its files; or {_trained_on(config)}",
    )


def _trained_on(config: LoraConfig) -> str:
    return f"it was trained on {config.base_model_name_or_path}; give it with --base PATH"


def _misfit(
    config: LoraConfig, file: pathlib.Path, sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> ModelError:
    """Why an adapter does not fit, with the sizes."""
    ranks = [
        f"{_plain(key)} has rank {own[axis]}, and {CONFIG} says {wanted[axis]}"
        for key, (own, wanted) in sizes.items()
        if (axis := RANK_AXES.get(key.rpartition(".lora_")[2].removesuffix(".weight"))) is not None
        and len(own) == 2
        and own[1 - axis] == wanted[1 - axis]
    ]
    if len(ranks) == len(sizes):
        return ModelError(some(ranks), where=str(file), fix="copy the adapter again, both its files")
    told = [
        f"{_plain(key)} is {by(own)} in the adapter and {by(wanted)} in the base" for key, (own, wanted) in sizes.items()
    ]
    # A vocabulary of another length, and the rest as it should be: tokens were added.
    added = all(re.search(r"embed_tokens|lm_head", key) and own[1:] == wanted[1:] for key, (own, wanted) in sizes.items())
    return ModelError(
        f"the adapter does not fit this base: {some(told)}",
        where=str(file),
        fix=ADDED_TOKENS if added else _trained_on(config),
    )


def _plain(name: str) -> str:
    """A tensor's name as the base has it, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.")
