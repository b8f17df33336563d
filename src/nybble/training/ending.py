"""What stays of a run: its adapter and its summary."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import torch
from peft import PeftModel

from nybble.callbacks import Recorder, peak_memory
from nybble.model.adapter import check_saved
from nybble.places import new_folder
from nybble.run import Run, read_metrics, versions
from nybble.training.preparation import Ready


def save_adapter(run: Run, model: PeftModel, kept_step: int) -> None:
    """Write the adapter of a step beside its place, read it back, and move it there."""
    with new_folder(run.adapter) as temporary:
        model.save_pretrained(temporary)
        check_saved(model, temporary, learnt=kept_step > 1)


def summarise(ready: Ready, recorder: Recorder, seconds: float) -> dict[str, Any]:
    recipe, data, base = ready.recipe, ready.data, ready.base
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(recorder.run) if "eval_loss" in line}
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
            "targets": sorted(ready.model.peft_config["default"].target_modules),
            "trainable_parameters": ready.trained_parameters,
        },
        "steps": recorder.steps,
        "processes": recipe.train.processes,
        "train_loss": recorder.loss,
        "validation_loss": {"before": losses[0], "kept": losses[recorder.kept_step]} if losses else None,
        "kept_step": recorder.kept_step,
        "tokens": recorder.tokens,
        "tokens_per_second": round(recorder.tokens_per_second, 1),
        "peak_memory_gb": round(peak_memory(ready.device) / 1e9, 3),
        "seconds": round(seconds, 1),
    }
