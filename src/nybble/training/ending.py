"""What stays of a run: its adapter and its summary."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import torch
from peft import PeftModel

from nybble.callbacks import Recorder, Spent
from nybble.errors import TrainingError
from nybble.model.adapter import check_saved
from nybble.model.adapter_updates import is_untrained, targets_of
from nybble.places import new_folder
from nybble.run import Run, read_metrics, versions
from nybble.training.preparation import Ready


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


def summarise(ready: Ready, recorder: Recorder, spent: Spent) -> dict[str, Any]:
    """The whole run in numbers, however often it was resumed."""
    recipe, data, base = ready.recipe, ready.data, ready.base
    lines, taken = read_metrics(recorder.run), spent.now(ready.device)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    steps = [line for line in lines if "tokens" in line]
    tokens, seconds = sum(line["tokens"] for line in steps), sum(line["seconds"] for line in steps)
    on_cuda = ready.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": torch.cuda.get_device_name(ready.device) if on_cuda else "cpu",
        "dtype": str(ready.dtype).removeprefix("torch."),
        "base": {
            "name": base.checkpoint.name,
            "commit": base.checkpoint.commit,
            "fingerprint": base.fingerprint,
            "quantization": base.quantization,
            "quantized": base.bits.as_json() if base.bits is not None else None,
            "parameters": ready.footprint.parameters,
            "bytes": ready.footprint.bytes,
        },
        "data": {
            "path": recipe.data.path,
            "fingerprint": data.fingerprint,
            "template": data.template.name,
            **dataclasses.asdict(data.counts),
        },
        "adapter": {
            "targets": targets_of(ready.model),
            "trainable_parameters": ready.trained_parameters,
        },
        "steps": recorder.steps,
        "processes": recipe.train.processes,
        "train_loss": steps[-1]["loss"],
        "validation_loss": {"before": losses[0], "kept": losses[recorder.kept_step]} if losses else None,
        "kept_step": recorder.kept_step,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),  # while training: evaluations and the like are not counted
        "seconds_in_steps": round(seconds, 1),
        "peak_memory_gb": round(taken["peak_memory"] / 1e9, 3),
        "seconds": taken["seconds"],
    }
