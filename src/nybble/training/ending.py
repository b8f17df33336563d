"""What stays of a run: its adapter and its summary."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Collection

import torch
from peft import PeftModel

from nybble.errors import TrainingError
from nybble.files.places import new_folder
from nybble.files.writing import write_json
from nybble.model.adapter.lora import check_saved
from nybble.model.adapter.updates import is_untrained, targets_of
from nybble.run.folder import Run
from nybble.run.log import read_metrics
from nybble.run.marks import COMPLETE, described
from nybble.run.start import QuantizedBase
from nybble.run.summary import AdapterSummary, BaseSummary, DataSummary, LossSummary, Summary
from nybble.run.versions import versions
from nybble.training.callbacks import Recorder, Spent
from nybble.training.preparation import Ready

# What training adds to a run folder before its first checkpoint, and the end of it before the adapter.
TRAINED = {
    *("metrics.jsonl", "samples.jsonl", "summary.json", "loss.png", "README.md"),
    *("wandb", "tensorboard", "trackio", "mlflow.db", "mlruns"),
}


def refuse_untrained(run: Run, model: PeftModel, recorder: Recorder) -> None:
    """Raise TrainingError where the adapter that would be kept answers as the base does, on all processes."""
    if not is_untrained(model):
        return
    rate = run.recipe.train.learning_rate
    if recorder.kept_step < recorder.steps:
        why = f"no later validation loss was better than that of step {recorder.kept_step}, before anything was learnt"
        fix = f"a learning rate other than {rate:g}, or train.keep_best=false for the adapter of the last step"
    else:
        why = f"no update in {recorder.steps:,} step{'s' * (recorder.steps > 1)} was large enough to change it"
        fix = f"a higher learning rate than {rate:g}, and train.warmup=0"
    fix += f": nybble train -c {run.folder}/recipe.yaml out=ANOTHER train.learning_rate=..."
    raise TrainingError(
        f"the run has learnt nothing: every B of its adapter is zero ({why})", where=str(run.metrics), fix=fix
    )


def save_adapter(run: Run, model: PeftModel) -> None:
    """Write the adapter of a step beside its place, read it back, and move it there."""
    with new_folder(run.adapter) as temporary:
        model.save_pretrained(temporary)
        check_saved(model, temporary)
        files = described(temporary, {"README.md"})  # which is there to be rewritten
        write_json(temporary / COMPLETE, {"files": files})


def summarise(ready: Ready, recorder: Recorder, spent: Spent) -> Summary:
    """The whole run in numbers, however often it was resumed."""
    recipe, data, base = ready.recipe, ready.data, ready.base
    taken, history = spent.now(ready.device), recorder.history
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    steps = [line for line in read_metrics(recorder.run) if line.tokens is not None]
    tokens, seconds = sum(line.tokens or 0 for line in steps), sum(line.seconds or 0.0 for line in steps)
    bits = base.bits.as_json() if base.bits is not None else None
    return Summary(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        device=torch.cuda.get_device_name(ready.device) if ready.device.type == "cuda" else "cpu",
        dtype=str(ready.dtype).removeprefix("torch."),
        base=BaseSummary(
            name=base.checkpoint.name,
            commit=base.checkpoint.commit,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            quantized=QuantizedBase.model_validate(bits) if bits is not None else None,
            parameters=ready.footprint.parameters,
            bytes=ready.footprint.bytes,
        ),
        data=DataSummary(
            path=recipe.data.path,
            fingerprint=data.fingerprint,
            template=data.template.name,
            **dataclasses.asdict(data.counts),
        ),
        adapter=AdapterSummary(targets=targets_of(ready.model), trainable_parameters=ready.trained_parameters),
        steps=recorder.steps,
        processes=recipe.train.processes,
        train_loss=next(entry["loss"] for entry in reversed(history) if "loss" in entry),
        validation_loss=LossSummary(before=losses[0], kept=losses[recorder.kept_step]) if losses else None,
        kept_step=recorder.kept_step,
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        seconds_in_steps=round(seconds, 1),
        peak_memory_gb=round(taken["peak_memory"] / 1e9, 3),
        seconds=taken["seconds"],
    )


def made_by_now(folder: pathlib.Path) -> frozenset[pathlib.Path]:
    """All that a run folder holds, by its path in there."""
    return frozenset(path.relative_to(folder) for path in folder.rglob("*"))


def foreign_files(run: Run, made: Collection[pathlib.Path]) -> list[pathlib.Path]:
    """What a run folder holds that neither was there before the run trained nor comes of its training.

    Args:
        run: without a checkpoint.
        made: what was there before.
    """
    found = made_by_now(run.folder) - set(made)
    return sorted(path for path in found if path.parts[0] not in TRAINED and not path.name.startswith("."))
