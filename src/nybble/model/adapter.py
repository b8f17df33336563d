"""Attach a LoRA adapter by PEFT, and prove that it is trained and saved."""

from __future__ import annotations

import itertools
import math
import pathlib
import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
from transformers import PreTrainedModel

from nybble.errors import ModelError, TrainingError
from nybble.model.patterns import check_patterns
from nybble.model.weights import LOADING_FAULTS, by, reason, refuse_pointers, some
from nybble.recipe import LoraOptions

FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[(.*?)\]\)"
)
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
        ModelError: no adapter there, or one that does not fit this base.
    """
    return _read_adapter(model, path, trainable=True)


def load_adapter(model: PreTrainedModel, path: str | pathlib.Path) -> PeftModel:
    """An adapter to answer with; its parameters are frozen."""
    return _read_adapter(model, str(path), trainable=False)


def add_adapter(model: PeftModel, path: str | pathlib.Path, name: str) -> None:
    """Another adapter on the same base, chosen by `set_adapter(name)`.

    Raises:
        ModelError: no adapter there, or one that does not fit this base.
    """
    config = _checked_config(model.get_base_model(), path)
    try:
        model.load_adapter(str(path), adapter_name=name, is_trainable=False)
    except LOADING_FAULTS as error:
        raise _misfit(config, path, error) from error


def read_adapter_config(path: str | pathlib.Path) -> PeftConfig:
    """PEFT's configuration of an adapter folder.

    Raises:
        ModelError: the folder holds no adapter.
    """
    folder = pathlib.Path(path)
    if not (folder / "adapter_config.json").is_file():
        inner = folder / "adapter"  # of a run
        raise ModelError(
            f"there is no adapter in {folder} (no adapter_config.json)",
            fix=f"adapter={inner}" if (inner / "adapter_config.json").is_file() else f"ls {folder}",
        )
    refuse_pointers(folder / name for name in FILES)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except LOADING_FAULTS as error:
        raise ModelError(
            f"PEFT cannot read adapter_config.json: {reason(error)}", where=str(folder / "adapter_config.json")
        ) from error


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


def is_untrained(model: PeftModel) -> bool:
    """Whether every B of the adapter is zero, as at the start: it then changes nothing."""
    updates = [tensor for name, tensor in get_peft_model_state_dict(model).items() if "lora_B" in name]
    return bool(updates) and not any(tensor.any() for tensor in updates)


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    unknown = [t for t in targets if not any(name == t or name.endswith("." + t) for name in names)]
    if unknown:
        raise ModelError(
            f"lora.targets: the model has no linear layer named {', '.join(unknown)}",
            fix=f"its linear layers are {', '.join(leaves)}; all-linear takes all but lm_head",
        )


def _read_adapter(model: PreTrainedModel, path: str, *, trainable: bool) -> PeftModel:
    config = _checked_config(model, path)
    try:
        adapted: PeftModel = PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)
    except LOADING_FAULTS as error:
        raise _misfit(config, path, error) from error
    return adapted


def _checked_config(model: PreTrainedModel, path: str | pathlib.Path) -> PeftConfig:
    """An adapter's configuration; refused where it trained rows of the embedding that this base does not have."""
    config = read_adapter_config(path)
    check_patterns(config, (name for name, _ in model.named_modules()), str(path))
    rows = model.get_input_embeddings().num_embeddings
    trained = getattr(config, "trainable_token_indices", None) or []
    ids = itertools.chain.from_iterable(trained.values()) if isinstance(trained, dict) else trained
    highest = max(ids, default=-1)
    if highest >= rows:
        raise ModelError(
            f"the adapter was trained on token {highest}, and the base has embeddings for ids 0 to {rows - 1} only: "
            "tokens were added to its base before training",
            where=str(path),
            fix=ADDED_TOKENS,
        )
    return config


def _misfit(config: PeftConfig, path: str | pathlib.Path, error: Exception) -> ModelError:
    """Why an adapter does not fit, with the sizes where these are the reason."""
    base = f"it was trained on {config.base_model_name_or_path}; give it with --base PATH"
    # PEFT tells of LoRA's own tensors, of whole modules that were trained (modules_to_save), and of the copies beside these.
    found = MISMATCH.findall(str(error))
    sizes = [
        (name, tuple(map(int, re.findall(r"\d+", own))), tuple(map(int, re.findall(r"\d+", base))))
        for name, own, base in found
        if ".original_module." not in name
    ]
    if not sizes:
        return ModelError(f"the adapter does not fit this base: {reason(error)}", where=str(path), fix=base)
    told = [f"{_plain(name)} is {by(own)} in the adapter and {by(wanted)} in the base" for name, own, wanted in sizes]
    # A vocabulary of another length, and the rest as it should be: tokens were added.
    added = all(re.search(r"embed_tokens|lm_head", name) and own[1:] == wanted[1:] for name, own, wanted in sizes)
    return ModelError(
        f"the adapter does not fit this base: {some(told)}", where=str(path), fix=ADDED_TOKENS if added else base
    )


def _plain(name: str) -> str:
    """A tensor's name as the base has it, without what PEFT puts around it."""
    return re.sub(r"^(base_model\.model\.)|\.modules_to_save\.[^.]+|(?<=lora_[AB])\.default", "", name)
