"""Load a base model, quantise it while loading, and keep the quantised copy for the next time."""

from __future__ import annotations

import contextlib
import copy
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from nybble.couplings.check import first_incompatibility
from nybble.errors import ModelError
from nybble.files import cache as entries
from nybble.installed import pip
from nybble.model.base.bits import TrainedBase, made_by
from nybble.model.base.cached import bits_of, check_unchanged, copy_path, find_copy, store
from nybble.model.base.checkpoint import Checkpoint, fingerprint
from nybble.model.base.files import LOADING_FAULTS, expected_shapes, reason
from nybble.model.base.finite import check_files, check_loaded
from nybble.model.base.soundness import check_report, check_tensors
from nybble.recipe import ModelOptions
from nybble.run.start import QuantizedBase
from nybble.weights.frozen import is_quantised, scale_bytes
from nybble.weights.on_cpu import stay_unpacked

ADAPTER_CONFIG = "adapter_config.json"
COPY, REBUILT = "the cached copy of the quantised base was", "will be rebuilt"


@dataclass(frozen=True)
class Base:
    """A loaded base model, and notices about it."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    fingerprint: str
    quantization: str
    """How it is stored: as the recipe says, or as the checkpoint does if it came quantised."""
    from_cache: bool
    notices: tuple[str, ...] = ()
    bits: QuantizedBase | None = None
    """The bits of a base that was quantised here; any other base is identified by its fingerprint."""


@dataclass(frozen=True)
class Footprint:
    """Size of a base model, in parameters and bytes."""

    parameters: int
    quantized: int
    """Parameters stored in 4 or 8 bits."""
    bytes: int
    """In memory, including the scales of quantised weights."""


def load_config(checkpoint: Checkpoint, rope_scaling: dict[str, object] | None) -> PretrainedConfig:
    """The model's configuration, with the recipe's rope scaling over its own.

    Raises:
        ModelError: Transformers cannot read it, or cannot build a model from it.
    """
    config = read_config(checkpoint.folder)
    if rope_scaling is not None:
        config.rope_parameters = {**(config.rope_parameters or {}), **rope_scaling}
        config.standardize_rope_params()
    expected_shapes(config, checkpoint.folder)
    return config


def load_base(
    checkpoint: Checkpoint, options: ModelOptions, dtype: torch.dtype, device: torch.device, cache: pathlib.Path,
    trained: TrainedBase | None = None,
) -> Base:  # fmt: skip
    """Load a base for training: quantised as requested, on one device, with frozen parameters.

    A checkpoint that came quantised is used unchanged. A base that is quantised here is cached, so that the next run
    reads 4 GB for a 7B and not 13.5. Everything that is read is verified by its digests, both the copy and the original weights.

    Args:
        checkpoint: the base's files.
        options: how it is to be stored.
        dtype: the type in which it computes.
        device: the device to load it on.
        cache: folder of quantised copies and digests.
        trained: the base that the resumed or opened run was trained on; a copy that contradicts it is made again, once.

    Raises:
        ModelError: the weights do not fit the configuration, or are not what the run was trained on; or a library lacks
            something that loading needs.
    """
    if (problem := first_incompatibility("model")) is not None:
        raise ModelError(problem.what, fix=f"{pip()} install {problem.requirement}")
    quantization, notices = _storage(checkpoint, options)
    config = load_config(checkpoint, options.rope_scaling)
    check_tensors(checkpoint.folder, config, is_quantized=checkpoint.quantized_as is not None)
    if checkpoint.quantized_as is not None or quantization == "none":
        digest = fingerprint(checkpoint, cache, prove=True)
        base = Base(_read(checkpoint.folder, config, None, dtype, device), checkpoint, digest, quantization, False)
    else:
        base = _quantised(checkpoint, options, config, dtype, device, cache, trained)
    notices += base.notices
    if base.bits is not None:
        notices += check_unchanged(base.bits, base.fingerprint, trained, checkpoint.folder)
    loaded = check_loaded(base.model, checkpoint.folder, dtype)
    notices += loaded if base.bits is None or base.from_cache else []  # otherwise `check_files` reported the same
    model = base.model
    _keep_control_tokens_only(model)
    model.name_or_path = checkpoint.name  # what PEFT writes into the adapter as its base
    model.config.use_cache = False  # a key-value cache hides packed samples from Transformers' mask
    model.requires_grad_(False)
    stay_unpacked(model)
    return replace(base, notices=tuple(notices))


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
    """Count a base's parameters and bytes; a 4-bit weight stores two parameters per byte, besides its scales."""
    parameters = quantized = size = 0
    layers = {id(module.weight): module for module in model.modules() if is_quantised(module)}
    for parameter in model.parameters():
        layer: Any = layers.get(id(parameter))
        count = layer.in_features * layer.out_features if layer is not None else parameter.numel()
        parameters += count
        quantized += count if layer is not None else 0
        size += parameter.numel() * parameter.element_size() + scale_bytes(parameter)
    return Footprint(parameters, quantized, size)


def read_config(folder: pathlib.Path) -> PretrainedConfig:
    """config.json as Transformers reads it.

    Raises:
        ModelError: Transformers cannot read it.
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
    """A base's folder without an adapter in it, which Transformers would load on top of the weights.

    A folder of links to the other files, since no argument of `from_pretrained` does this in every version: 5.17 looks for the
    adapter in the folder itself, 5.23 in a subfolder that may be given.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as linked:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (pathlib.Path(linked) / file.name).symlink_to(file.resolve())
        yield pathlib.Path(linked)


def _read(
    folder: pathlib.Path,
    config: PretrainedConfig,
    plan: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The weights of a folder and nothing else; none is missing, and each has the shape that the configuration says."""
    extra = {} if plan is None else {"quantization_config": plan}
    try:
        model: PreTrainedModel
        with weights_alone(folder) as weights:
            model, report = AutoModelForCausalLM.from_pretrained(
                weights, config=config, dtype=dtype, device_map={"": device},
                output_loading_info=True, ignore_mismatched_sizes=True, **extra,
            )  # fmt: skip
    except LOADING_FAULTS as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ModelError(
            f"the weights cannot be loaded: {reason(error)}", where=str(folder), fix="copy or download the model again"
        ) from error
    check_report(report, config, folder)
    return model


def _storage(checkpoint: Checkpoint, options: ModelOptions) -> tuple[str, list[str]]:
    """How the base will be stored, with a notice where the checkpoint decides it.

    Raises:
        ModelError: the checkpoint is quantised in another way than the one requested.
    """
    stored, requested = checkpoint.quantized_as, options.quantization
    if stored is None or stored == requested:
        return requested, []
    if "quantization" in options.model_fields_set:
        raise ModelError(
            f"the checkpoint is already quantised as {stored} and cannot become {requested}",
            fix=f"model.quantization={stored}, or start from the 16-bit checkpoint",
        )
    return stored, [f"the checkpoint is already quantised as {stored} and is used unchanged"]


def _quantised(
    checkpoint: Checkpoint, options: ModelOptions, config: PretrainedConfig, dtype: torch.dtype, device: torch.device,
    cache: pathlib.Path, trained: TrainedBase | None,
) -> Base:  # fmt: skip
    """A base from the cache, or quantised now and cached."""
    digest = fingerprint(checkpoint, cache)
    entry = find_copy(copy_path(digest, options.quantization, options.double_quantization, dtype, cache))
    notices = entry.notices(COPY, REBUILT)
    if entry.facts is not None:
        bits = bits_of(entry.facts)
        try:
            if trained is not None and trained.contradicts(bits, digest):
                raise ModelError("it is not the one that the run was trained on")
            model = _read(entry.path, _as_cached(config, entry.path), None, dtype, device)
            return Base(model, checkpoint, digest, options.quantization, True, tuple(notices), bits)
        except ModelError as fault:
            if not entries.discard(entry.path):
                raise
            notices = [f"{COPY} damaged ({fault.what}) and {REBUILT}"]
    if fingerprint(checkpoint, cache, prove=True) != digest:  # the cached digests of the weights were wrong
        return _quantised(checkpoint, options, config, dtype, device, cache, trained)
    notices += check_files(checkpoint.folder)
    plan = quantization_plan(options.quantization, options.double_quantization, dtype)
    model = _read(checkpoint.folder, config, plan, dtype, device)
    _keep_control_tokens_only(model)
    bits, more = store(model, entry.path, measure(model).bytes, made_by(device, dtype))
    return Base(model, checkpoint, digest, options.quantization, False, (*notices, *more), bits)


def _as_cached(config: PretrainedConfig, folder: pathlib.Path) -> PretrainedConfig:
    """The configuration with the cached copy's own quantisation.

    Raises:
        ModelError: it has none.
    """
    quantised = copy.deepcopy(config)
    stored = getattr(read_config(folder), "quantization_config", None)
    if stored is None:
        raise ModelError("it is not a quantised model")
    quantised.quantization_config = stored
    return quantised


def _keep_control_tokens_only(model: PreTrainedModel) -> None:
    """Keep only the control tokens of the model's generation settings: the caller chooses how to sample, and the settings
    that come with Llama 2 (a temperature without sampling) cannot be saved.
    """
    settings = model.generation_config
    if settings is not None:
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id, eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id
        )
