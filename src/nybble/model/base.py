"""Load a base model, quantise it while loading, and keep the quantised copy for the next time."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from nybble.errors import ModelError
from nybble.model.checkpoint import Checkpoint, fingerprint
from nybble.model.soundness import check_files, check_loaded, check_report, check_tensors
from nybble.model.weights import LOADING_FAULTS, check_whole, differs, reason, skeleton, weight_files
from nybble.quantized import stay_unpacked
from nybble.recipe import ModelOptions

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Base:
    """A loaded base model and what is worth telling of it."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    fingerprint: str
    quantization: str
    """As it is stored: the option's, or the checkpoint's own where it came quantised."""
    from_cache: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """Size of a base model, in parameters and bytes."""

    parameters: int
    quantized: int
    """Parameters stored in 4 or 8 bits."""
    bytes: int
    """As held in memory, the scales of quantised weights included."""


def load_config(checkpoint: Checkpoint, rope_scaling: dict[str, object] | None) -> PretrainedConfig:
    """The model's configuration, with rope scaling laid over its own.

    Raises:
        ModelError: Transformers cannot read it, or cannot build a model from it.
    """
    config = read_config(checkpoint.folder)
    if rope_scaling is not None:
        config.rope_parameters = {**(config.rope_parameters or {}), **rope_scaling}
        config.standardize_rope_params()
    skeleton(config, checkpoint.folder)
    return config


def load_base(
    checkpoint: Checkpoint, options: ModelOptions, dtype: torch.dtype, device: torch.device, cache: pathlib.Path
) -> Base:
    """Load a base for training: quantised as asked, on one device, its parameters frozen.

    A checkpoint that is quantised already is taken as it is. What is quantised here is kept under `cache`, so that the
    next run reads 4 GB for a 7B and not 13.5.

    Raises:
        ModelError: weights that do not fit the configuration.
    """
    notices: list[str] = []
    stored, quantization = checkpoint.quantized_as, options.quantization
    if stored is not None and stored != quantization:
        if "quantization" in options.model_fields_set:
            raise ModelError(
                f"the checkpoint is already quantised as {stored} and cannot become {quantization}",
                fix=f"model.quantization={stored}, or start from the 16-bit checkpoint",
            )
        notices.append(f"the checkpoint is already quantised as {stored} and is used unchanged")
        quantization = stored  # type: ignore[assignment]
    config = load_config(checkpoint, options.rope_scaling)
    check_tensors(checkpoint.folder, config, is_quantized=stored is not None)
    mark = fingerprint(checkpoint, cache)
    kept, looked = None, list[str]()
    if stored is not None or quantization == "none":
        model = _read(checkpoint.folder, config, None, dtype, device)
    else:
        folder = kept_copy(mark, quantization, options.double_quantization, dtype, cache)
        kept, found = _read_kept(folder, config, dtype, device)
        notices += found
        if kept is None:
            looked = check_files(checkpoint.folder)
            plan = quantization_plan(quantization, options.double_quantization, dtype)
            model = _read(checkpoint.folder, config, plan, dtype, device)
            _plain_generation(model)
            notices += _keep(model, folder)
        else:
            model = kept
    loaded = check_loaded(model, checkpoint.folder, dtype)
    notices += looked or loaded
    _plain_generation(model)
    model.name_or_path = checkpoint.name  # what PEFT writes into the adapter as its base
    model.config.use_cache = False  # a key-value cache hides packed samples from Transformers' mask
    model.requires_grad_(False)
    stay_unpacked(model)
    return Base(model, checkpoint, mark, quantization, kept is not None, tuple(notices))


def kept_copy(
    mark: str, quantization: str, double_quantization: bool, dtype: torch.dtype, cache: pathlib.Path
) -> pathlib.Path:
    """Where the quantised copy of a base with that fingerprint is kept, if there was room for it."""
    parts = (mark, quantization, double_quantization, str(dtype), bitsandbytes.__version__)
    return cache / "base" / hashlib.sha256(repr(parts).encode()).hexdigest()


def quantization_plan(quantization: str, double_quantization: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's storage (Dettmers et al. 2023): 4-bit weights in blocks of 64, their scales quantised once more."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def measure(model: torch.nn.Module) -> Footprint:
    """Count a base's parameters and bytes; a 4-bit weight stores two parameters a byte beside its scales."""
    parameters = quantized = size = 0
    layers = {id(module.weight): module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    for parameter in model.parameters():
        layer = layers.get(id(parameter))
        count = layer.in_features * layer.out_features if layer is not None else parameter.numel()
        parameters += count
        quantized += count if layer is not None else 0
        size += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # the scales, and the scales of the scales
            size += state.absmax.numel() * state.absmax.element_size()
            state = state.state2
    return Footprint(parameters, quantized, size)


def read_config(folder: pathlib.Path) -> PretrainedConfig:
    """config.json as Transformers reads it.

    Raises:
        ModelError: it cannot.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except LOADING_FAULTS as error:
        raise ModelError(
            f"Transformers cannot read config.json: {reason(error)}",
            where=str(folder / "config.json"),
            fix="compare it with config.json on the model's page",
        ) from error


@contextlib.contextmanager
def weights_alone(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A base's folder as Transformers should see it: without an adapter in it, which it would load on top of the weights.

    Links to the other files, since no argument of `from_pretrained` says so in every version: 5.17 looks for the adapter in the
    folder itself, 5.23 in a subfolder that may be named.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (pathlib.Path(place) / file.name).symlink_to(file.resolve())
        yield pathlib.Path(place)


def _read(
    folder: pathlib.Path,
    config: PretrainedConfig,
    plan: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The weights of a folder and nothing else; all of them, each of the size that the configuration says."""
    extra = {} if plan is None else {"quantization_config": plan}
    try:
        model: PreTrainedModel
        with weights_alone(folder) as place:
            model, found = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, device_map={"": device},
                output_loading_info=True, ignore_mismatched_sizes=True, **extra,
            )  # fmt: skip
    except LOADING_FAULTS as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelError(
            f"the weights cannot be loaded: {reason(error)}", where=str(folder), fix="copy or download the model again"
        ) from error
    check_report(found, config, folder)
    return model


def _read_kept(
    folder: pathlib.Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel | None, list[str]]:
    """The kept copy of a quantised base, or None where there is none; one that does not load is removed, with a notice."""
    if not folder.exists():
        return None, []
    try:
        quantised = copy.deepcopy(config)
        stored = getattr(read_config(folder), "quantization_config", None)
        files = weight_files(folder)
        if stored is None or not files:
            raise ModelError("it is not a quantised model")
        quantised.quantization_config = stored
        for file in files:
            check_whole(file)
        return _read(folder, quantised, None, dtype, device), []
    except ModelError as fault:
        shutil.rmtree(folder, ignore_errors=True)
        return None, [f"the cached copy of the quantised base was damaged ({fault.what}) and is rebuilt"]


def _plain_generation(model: PreTrainedModel) -> None:
    """Leave only the control tokens of the model's generation settings: sampling is the caller's, and the settings that
    come with Llama 2 (a temperature without sampling) cannot be saved.
    """
    own = model.generation_config
    if own is not None:
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )


def _keep(model: PreTrainedModel, folder: pathlib.Path) -> list[str]:
    """Write the quantised base into the cache; a notice where there is no room for it."""
    size = measure(model).bytes
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < 1.1 * size:
        return [
            f"the quantised base ({size / 1e9:.1f} GB) is not cached: {free / 1e9:.1f} GB are free at {folder.parent}"
        ]
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        if fault := differs(model, temporary):  # an entry is proven before it takes its place: later runs trust it
            return [f"the quantised base is not cached: {fault}"]
        try:
            os.rename(temporary, folder)
        except OSError:  # another process kept the same base meanwhile, or what stands there cannot be removed
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return []
