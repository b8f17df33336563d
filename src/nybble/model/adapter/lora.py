"""Attach a LoRA adapter with PEFT, and verify that it is trained and saved."""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from transformers import PreTrainedModel

from nybble.errors import ModelError, TrainingError
from nybble.model.adapter.config import CONFIG, read_adapter_config
from nybble.model.adapter.patterns import check_patterns
from nybble.model.adapter.placement import ADDED_TOKENS, fill, trained_on
from nybble.model.adapter.tensors import read_tensors
from nybble.model.base.files import LOADING_FAULTS, reason, some
from nybble.recipe import LoraOptions

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


def check_stored(path: str | pathlib.Path) -> None:
    """Check whatever can be wrong with an adapter on any base, before one is loaded.

    Raises:
        ModelError: no adapter there, one of another kind, or a damaged one.
    """
    read_adapter_config(path)
    read_tensors(pathlib.Path(path))


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
    changed = fill(model, name, file, tensors)
    if changed:
        raise ModelError(
            f"the adapter brings its own {some(changed)}, but adapters that share a base in memory share its embeddings",
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
    fill(adapted, "default", file, tensors)
    return adapted if trainable else adapted.eval()


def _read_stored(
    model: PreTrainedModel, path: str | pathlib.Path
) -> tuple[LoraConfig, pathlib.Path, dict[str, torch.Tensor]]:
    """Configuration, file and tensors; refused where rows of the embedding were trained that this base does not have."""
    config = read_adapter_config(path)
    check_patterns(config, (name for name, _ in model.named_modules()), str(path))
    rows = model.get_input_embeddings().weight.shape[0]
    trained = config.trainable_token_indices or []
    ids = itertools.chain.from_iterable(trained.values()) if isinstance(trained, dict) else trained
    highest = max(ids, default=-1)
    if highest >= rows:
        raise ModelError(
            f"the adapter was trained on token {highest}, but the base has embeddings for ids 0 to {rows - 1} only: "
            "tokens were added to its base before training",
            where=str(path),
            fix=ADDED_TOKENS,
        )
    file, tensors = read_tensors(pathlib.Path(path))
    claimed = max([config.r, *(config.rank_pattern or {}).values()])
    if claimed > max(max(tensor.shape, default=1) for tensor in tensors.values()):  # PEFT would make room for it
        raise ModelError(
            f"{CONFIG} says rank {claimed:,}, but no tensor in {file.name} is that large",
            where=str(file),
            fix="copy both files of the adapter again",
        )
    _drop_without_effect(config, model)
    return config, file, tensors


def _drop_without_effect(config: LoraConfig, model: torch.nn.Module) -> None:
    """Settings that mean nothing on this base, which PEFT warns about at every load or each time the adapter is off."""
    config.fan_in_fan_out = False  # a layout of GPT-2's Conv1D; Linear weights have one alone
    if not any(name.endswith(".bias") and ".lora_B." not in name for name, _ in model.named_parameters()):
        config.bias = "none"


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
        raise ModelError(
            f"the adapter does not fit this base: {reason(error)}", where=str(path), fix=trained_on(config)
        ) from error
