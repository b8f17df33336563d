"""The run that is exported: its base, compared with that of the training, and the bases that its adapter can be merged into."""

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
class FinishedRun:
    """A finished run and its base.

    Attributes:
        run: the run, with the device and type of this export in its recipe.
        checkpoint: the base.
        config: the base's configuration, with the run's RoPE scaling.
        fingerprint: the fingerprint of the base's weights.
        computed: the compute type of the run.
        stored: the type in which merged weights are stored.
        notices: lines for the user.
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
        """How the base was stored in training."""
        return self.checkpoint.quantized_as or self.run.recipe.model.quantization

    @property
    def quantizes(self) -> bool:
        """Whether the run quantised the base itself."""
        return self.checkpoint.quantized_as is None and self.quantization != "none"


def open_finished_run(run: Run, dtype: str, cache: pathlib.Path) -> FinishedRun:
    """Find a run's base and compare it with the record of the training.

    Args:
        run: the run, or an adapter folder.
        dtype: auto (the checkpoint's 16-bit type, else bfloat16), bfloat16 or float16.
        cache: folder of digests and quantised bases.

    Raises:
        RunError: the training has not ended, or another process is training the run.
        ModelError: the base is missing, damaged, or not the one of the training.
    """
    refuse_unfinished(run)
    model = run.recipe.model
    checkpoint = find_base(run)
    now = fingerprint(checkpoint, cache, prove=True)
    record = run.summary()
    run.evaluation()  # the card will show it, so report damage before the work
    notices = _compare_base(checkpoint, now, _recorded_base(run))
    if run.is_bare_adapter and checkpoint.quantized_as is None:
        notices += (
            f"there is no record of how the base was stored: assuming {model.quantization}, as in QLoRA; "
            "if it was trained on 16-bit weights, use --merge-base original",
        )
    device = torch.device("cpu") if not torch.cuda.is_available() else choose_device(model.device)
    then = record.dtype if record is not None else model.dtype
    if device.type == "cpu" and then == "float16":
        then = "float32"  # a CPU cannot train in float16; the quantised weights are the same
    computed, _ = choose_dtype(then, device)
    options = model.model_copy(update={"dtype": str(computed).removeprefix("torch."), "device": device.type})
    run = replace(run, recipe=run.recipe.model_copy(update={"model": options}))
    config = load_config(checkpoint, model.rope_scaling)
    own_type = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    stored = dtype if dtype != "auto" else own_type if own_type in ("bfloat16", "float16") else "bfloat16"
    return FinishedRun(run, checkpoint, config, now, computed, DTYPES[stored], notices)


def _recorded_base(run: Run) -> str | None:
    """The fingerprint of the base that a run was trained on; None if it was not recorded."""
    if (record := run.summary()) is not None:
        return record.base.fingerprint
    is_recorded = not run.is_bare_adapter and (run.folder / "start.json").exists()
    return run.start().base if is_recorded else None


def _compare_base(checkpoint: Checkpoint, now: str, then: str | None) -> tuple[str, ...]:
    if then is None:
        return ("there is no record of the base that the adapter was trained on: assuming this one",)
    if now == then:
        return ()
    if now.startswith("sha256:") != then.startswith("sha256:"):
        return (f"the base was {then} and is a folder or a Hub id now: assuming that its weights are the same",)
    raise ModelError(
        f"this is not the base that the adapter was trained on: {now} now, {then} then",
        where=str(checkpoint.folder),
        fix="--base PATH, with the base of the training",
    )


def bases_of(source: FinishedRun, cache: pathlib.Path) -> dict[str, Weights]:
    """The weights that an adapter can be merged into; the quantised ones are training's cached copy, verified again.

    Raises:
        ExportError: the disk is too full for the quantised base.
    """
    folder, quantization = source.checkpoint.folder, source.quantization
    if source.checkpoint.quantized_as is not None:
        return {"dequantised": Dequantised(folder)}
    if not source.quantizes:
        return {"original": Original(folder)}
    double = source.run.recipe.model.double_quantization
    cached = find_copy(copy_path(source.fingerprint, quantization, double, source.computed, cache))
    if cached.facts is None:
        raise ExportError(
            "the quantised base is not cached: the disk is too full", where=str(cache), fix="free some space there"
        )
    return {"original": Original(folder), "dequantised": Dequantised(cached.path)}


def merges_of(
    source: FinishedRun, updates: Mapping[str, Update], requested: str, cache: pathlib.Path
) -> tuple[dict[str, Merge], str | None]:
    """Each possible base with the updates, and a line for the user if there is only one.

    Args:
        source: the run.
        updates: the updates of its adapter.
        requested: auto, original or dequantised.
        cache: the cache with the quantised base.

    Raises:
        ExportError: the requested base is not possible.
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
        if requested not in ("auto", only):
            raise ExportError(f"--merge-base {requested}: {notice}", fix=f"--merge-base {only}, or omit it")
    tied = bool(source.config.tie_word_embeddings)
    merges = {name: Merge(weights, updates, tied, source.stored) for name, weights in bases.items()}
    for merge in merges.values():
        merge.specs()
    return merges, notice
