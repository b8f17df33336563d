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
from nybble.model.adapter.placement import ADDED_TOKENS, base_hint, load_tensors
from nybble.model.adapter.tensors import read_tensors
from nybble.model.base.files import LOADING_FAULTS, reason
from nybble.recipe import LoraOptions
from nybble.terminal import first_of

# Not offered: PEFT's orthogonal initialisation, which fails on 4-bit layers (0.21), and PiSSA and LoftQ, which change the base.
INIT: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}


def attach_adapter(model: PreTrainedModel, options: LoraOptions) -> PeftModel:
    """A new adapter on a frozen base; its parameters are float32, the base's stay as they are.

    Raises:
        ModelError: no linear layer has the name of a target; with the names that exist.
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
    """Check an adapter for everything that does not depend on the base, before that is loaded.

    Raises:
        ModelError: there is no adapter, it is of another kind, or it is damaged.
    """
    read_adapter_config(path)
    read_tensors(pathlib.Path(path))


def resume_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """Load an existing adapter to continue its training.

    Raises:
        ModelError: there is no adapter, it is damaged, or it does not fit this base.
    """
    return _attach_stored(model, path, trainable=True)


def load_adapter(model: PreTrainedModel, path: str | pathlib.Path) -> PeftModel:
    """Load an adapter for generation; its parameters are frozen.

    Raises:
        ModelError: as `resume_adapter`.
    """
    return _attach_stored(model, path, trainable=False)


def add_adapter(model: PeftModel, path: str | pathlib.Path, name: str) -> None:
    """Load another adapter on the same base; `set_adapter(name)` selects it.

    Raises:
        ModelError: as `resume_adapter`, or it would change the base for the others.
    """
    config, file, tensors = _read_stored(model.get_base_model(), path)
    with _without_initialising(config, trainable=False), _explained(config, path):
        model.add_adapter(name, config, low_cpu_mem_usage=not config.use_dora)
    changed = load_tensors(model, name, file, tensors)
    if changed:
        raise ModelError(
            f"the adapter brings its own {first_of(changed)}, but adapters that share a base in memory share its embeddings",
            where=str(file),
            fix="load it alone: one server per such adapter, each on its own --port",
        )
    model.eval()


def check_gradients(model: torch.nn.Module, *, first: bool, scaled: bool = False) -> None:
    """Check after a backward pass that every adapter tensor has a finite gradient.

    Args:
        first: whether this is the first step, at which B and so A's gradient are zero; B's must not be.
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
    zeros = [
        name
        for (name, _), norm in zip(named, norms, strict=True)
        if norm == 0 and ("lora_B" in name or not first) and "magnitude" not in name
    ]
    if len(zeros) == len(norms) or (first and zeros):
        raise TrainingError(
            f"{len(zeros)} of {len(named)} adapter tensors have a zero gradient, the first {zeros[:1]}",
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
    with _without_initialising(config, trainable=trainable), _explained(config, path):
        adapted: PeftModel = PeftModelForCausalLM(model, config, low_cpu_mem_usage=not config.use_dora)
    load_tensors(adapted, "default", file, tensors)
    return adapted if trainable else adapted.eval()


def _read_stored(
    model: PreTrainedModel, path: str | pathlib.Path
) -> tuple[LoraConfig, pathlib.Path, dict[str, torch.Tensor]]:
    """Configuration, file and tensors; an adapter that trained embeddings this base does not have is refused."""
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
    if claimed > max(max(tensor.shape, default=1) for tensor in tensors.values()):  # PEFT would allocate memory for it
        raise ModelError(
            f"{CONFIG} says rank {claimed:,}, but no tensor in {file.name} is that large",
            where=str(file),
            fix="copy both files of the adapter again",
        )
    _drop_without_effect(config, model)
    return config, file, tensors


def _drop_without_effect(config: LoraConfig, model: torch.nn.Module) -> None:
    """Drop settings without effect on this base, about which PEFT warns at every load or whenever the adapter is disabled."""
    config.fan_in_fan_out = False  # the layout of GPT-2's Conv1D; Linear weights have only one layout
    if not any(name.endswith(".bias") and ".lora_B." not in name for name, _ in model.named_parameters()):
        config.bias = "none"


@contextlib.contextmanager
def _without_initialising(config: LoraConfig, *, trainable: bool) -> Iterator[None]:
    """Build an adapter without initialising its numbers, which come from the file.

    Only DoRA is initialised: PEFT 0.21 dequantises the base for it, and would lose an 8-bit one.
    """
    start, config.init_lora_weights, config.inference_mode = config.init_lora_weights, True, not trainable
    try:
        yield
    finally:
        config.init_lora_weights = start


@contextlib.contextmanager
def _explained(config: LoraConfig, path: str | pathlib.Path) -> Iterator[None]:
    """Turn PEFT's errors about a configuration on this base into a ModelError."""
    try:
        yield
    except LOADING_FAULTS as error:
        raise ModelError(
            f"the adapter does not fit this base: {reason(error)}", where=str(path), fix=base_hint(config)
        ) from error
