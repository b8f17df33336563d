"""The run that is exported: its base found and held against what it was, and the bases that its adapter may be added to."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from nybble.errors import ExportError, ModelError
from nybble.export.merge.merge import Dequantised, Merge, Original, Weights
from nybble.export.merge.updates import Update
from nybble.model.base.cached import copy_path, find_copy
from nybble.model.base.checkpoint import Checkpoint, find_base, fingerprint
from nybble.model.base.load import load_config
from nybble.model.device import DTYPES, choose_device, choose_dtype
from nybble.run.folder import Run, refuse_unfinished


@dataclass(frozen=True)
class Source:
    """A finished run and its base.

    Attributes:
        run: with the device and type of this export in its recipe.
        checkpoint: the base.
        config: the base's, with the run's RoPE scaling.
        fingerprint: of the base's weights.
        computed: the type in which the run computed.
        stored: the type in which merged weights are stored.
        notices: what is worth telling.
    """

    run: Run
    checkpoint: Checkpoint
    config: PretrainedConfig
    fingerprint: str
    computed: torch.dtype
    stored: torch.dtype
    notices: tuple[str, ...]

    @property
    def quantization(self) -> str:
        """How the base was held in training."""
        return self.checkpoint.quantized_as or self.run.recipe.model.quantization

    @property
    def quantizes(self) -> bool:
        """Whether the run quantised the base itself."""
        return self.checkpoint.quantized_as is None and self.quantization != "none"


def open_source(run: Run, dtype: str, cache: pathlib.Path) -> Source:
    """Find a run's base and hold it against the record of the training.

    Args:
        run: the run, or an adapter folder.
        dtype: auto (the checkpoint's own 16-bit type, else bfloat16), bfloat16 or float16.
        cache: where digests and quantised bases are kept.

    Raises:
        RunError: the training has not ended, or another process is at it.
        ModelError: the base is gone, damaged, or another one now.
    """
    refuse_unfinished(run)
    model = run.recipe.model
    checkpoint = find_base(run)
    mark = fingerprint(checkpoint, cache, prove=True)
    record = run.summary()
    run.evaluation()  # which the card shows in the end: what is wrong with it is said before the work
    notices = _held_against_record(checkpoint, mark, _recorded_base(run))
    if run.is_bare_adapter and checkpoint.quantized_as is None:
        notices += (
            f"nothing records how the base was stored: assuming {model.quantization}, as in QLoRA; "
            "if it was trained on 16-bit weights, use --merge-base original",
        )
    device = torch.device("cpu") if not torch.cuda.is_available() else choose_device(model.device)
    then = record["dtype"] if record is not None else model.dtype
    if device.type == "cpu" and then == "float16":
        then = "float32"  # a CPU has no float16 to train with; what is quantised from it is the same
    computed, _ = choose_dtype(then, device)
    options = model.model_copy(update={"dtype": str(computed).removeprefix("torch."), "device": device.type})
    run = replace(run, recipe=run.recipe.model_copy(update={"model": options}))
    config = load_config(checkpoint, model.rope_scaling)
    own = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    stored = dtype if dtype != "auto" else own if own in ("bfloat16", "float16") else "bfloat16"
    return Source(run, checkpoint, config, mark, computed, DTYPES[stored], notices)


def _recorded_base(run: Run) -> str | None:
    """The fingerprint of the base that a run was trained on; None where nothing records it."""
    if (record := run.summary()) is not None:
        return str(record["base"]["fingerprint"])
    is_recorded = not run.is_bare_adapter and (run.folder / "start.json").exists()
    return str(run.start()["base"]) if is_recorded else None


def _held_against_record(checkpoint: Checkpoint, mark: str, then: str | None) -> tuple[str, ...]:
    if then is None:
        return ("nothing records which base the adapter was trained on: assuming this one",)
    if mark == then:
        return ()
    if mark.startswith("sha256:") != then.startswith("sha256:"):
        return (f"the base was {then} and is a folder or a Hub id now: assuming that its weights are the same",)
    raise ModelError(
        f"this is not the base that the adapter was trained on: {mark} now, {then} then",
        where=str(checkpoint.folder),
        fix="--base PATH, with the base of the training",
    )


def bases_of(source: Source, cache: pathlib.Path) -> dict[str, Weights]:
    """The weights that an adapter can be added to; the quantised ones as training left them in the cache, proven once more.

    Raises:
        ExportError: there was no room for the quantised base.
    """
    folder, quantization = source.checkpoint.folder, source.quantization
    if source.checkpoint.quantized_as is not None:
        return {"dequantised": Dequantised(folder)}
    if not source.quantizes:
        return {"original": Original(folder)}
    double = source.run.recipe.model.double_quantization
    kept = find_copy(copy_path(source.fingerprint, quantization, double, source.computed, cache))
    if kept.facts is None:
        raise ExportError(
            "the quantised base is not cached: the disk is too full", where=str(cache), fix="free some space there"
        )
    return {"original": Original(folder), "dequantised": Dequantised(kept.place)}


def merges_of(
    source: Source, updates: Mapping[str, Update], asked: str, cache: pathlib.Path
) -> tuple[dict[str, Merge], str | None]:
    """Each base that comes into question with the updates, and what is to be said where there is one only.

    Args:
        source: the run.
        updates: of its adapter.
        asked: auto, original or dequantised.
        cache: where the quantised base is.

    Raises:
        ExportError: the base that was asked for is not to be had.
        ModelError: the adapter does not fit.
    """
    bases = bases_of(source, cache)
    notice = None
    if len(bases) == 1:
        (only,) = bases
        why = (
            f"the run started from a checkpoint already stored as {source.quantization}"
            if only == "dequantised"
            else "the run trained on weights that were not quantised"
        )
        notice = f"only the {only} base is possible: {why}"
        if asked not in ("auto", only):
            raise ExportError(f"--merge-base {asked}: {notice}", fix=f"--merge-base {only}, or omit it")
    tied = bool(source.config.tie_word_embeddings)
    merges = {name: Merge(weights, updates, tied, source.stored) for name, weights in bases.items()}
    for merge in merges.values():
        merge.specs()
    return merges, notice
