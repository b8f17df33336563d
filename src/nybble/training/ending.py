"""The end of a run: its adapter and summary, or, if it failed, what can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import pathlib
import shutil
from collections.abc import Collection, Iterator

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console

from nybble.distributed.group import broadcast
from nybble.errors import TrainingError
from nybble.files.atomic import new_folder
from nybble.files.writing import write_json
from nybble.model.adapter.lora import check_saved
from nybble.model.adapter.updates import is_untrained, targets_of
from nybble.run.folder import Run
from nybble.run.log import read_metrics
from nybble.run.marks import COMPLETE, described
from nybble.run.start import MICRO_BATCH
from nybble.run.summary import AdapterSummary, BaseSummary, DataSummary, LossSummary, Summary
from nybble.run.versions import versions
from nybble.terminal import tell
from nybble.training.checkpoints import remove_unfinished
from nybble.training.preparation import TrainingSetup
from nybble.training.recorder import Recorder
from nybble.training.resource_use import ResourceUse

# What is written into a run folder between its creation and the adapter, besides checkpoints.
WRITTEN_BY_TRAINING = {
    *("metrics.jsonl", "samples.jsonl", "summary.json", "loss.png", "README.md"),
    *("wandb", "tensorboard", "trackio", "mlflow.db", "mlruns"),
}


@contextlib.contextmanager
def cleanup_on_failure(
    run: Run, state: PartialState, console: Console, made: Collection[pathlib.Path] | None
) -> Iterator[None]:
    """After a failure before the first complete checkpoint, remove the run folder, unless it contains evidence of what happened
    or files that are not the run's; after a later failure, leave what can be resumed.

    Args:
        run: the run.
        state: the state of the processes.
        console: prints what is left.
        made: the paths in the folder before training; None if this process did not create the folder.
    """
    completed = False
    try:
        yield
        completed = True
    finally:  # after any exception: tokenizers raises a plain Exception if a disk is full
        if not completed:
            _clean_up(run, state, console, made)


def _clean_up(run: Run, state: PartialState, console: Console, made: Collection[pathlib.Path] | None) -> None:
    checkpoint, evidence = run.latest_checkpoint(), any(run.folder.glob("nonfinite-*"))
    if state.is_main_process:
        remove_unfinished(run)
    again = f"nybble train --resume {run.folder}"
    if checkpoint is not None:
        tell(console, f"stopped   {checkpoint} is complete; resume with: {again}")
    elif state.is_main_process and not evidence:
        others = foreign_files(run, made) if made is not None else []
        if made is not None and not others:
            shutil.rmtree(run.folder, ignore_errors=True)
            tell(console, "stopped   before the first checkpoint: nothing of this run was kept")
        else:
            why = f", since it contains {others[0]}, which is not part of the run" if others else ""
            tell(
                console, f"stopped   before the first checkpoint; {run.folder} stays{why}; start it over with: {again}"
            )


def refuse_untrained(run: Run, model: PeftModel, recorder: Recorder) -> None:
    """Raise TrainingError, in all processes, if the adapter that would be saved, the first one's, changes nothing."""
    if not broadcast(is_untrained(model)):
        return
    rate = run.recipe.train.peak_rate
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


def _products(setup: TrainingSetup) -> str:
    """As `Summary.products`."""
    fusion = setup.fusion
    if fusion is None or fusion.fp8 is None:
        return str(setup.dtype).removeprefix("torch.")
    return f"{fusion.fp8}" + (
        f" in {fusion.fused} layers of {fusion.fused + fusion.fallen_back}" if fusion.fallen_back else ""
    )


def save_adapter(run: Run, model: PeftModel) -> None:
    """Write the adapter to a temporary folder, read it back, and move it to its final location."""
    with new_folder(run.adapter) as temporary:
        model.save_pretrained(temporary)
        check_saved(model, temporary)
        files = described(temporary, {"README.md"})  # README.md, which may be edited
        write_json(temporary / COMPLETE, {"files": files})


def summarise(setup: TrainingSetup, recorder: Recorder, used: ResourceUse, first: int | None) -> Summary:
    """The whole run in numbers, however often it was resumed; `first`: as `Summary.halved_from`."""
    recipe, data, base = setup.recipe, setup.data, setup.base
    taken, history = used.so_far(setup.device), recorder.history
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    steps = [line for line in read_metrics(recorder.run) if line.tokens is not None]
    # The peak before a change is that of the larger micro batch.
    is_first = recorder.run.start().recipe.train.get(MICRO_BATCH) == recipe.train.micro_batch
    tokens, seconds = sum(line.tokens or 0 for line in steps), sum(line.seconds or 0.0 for line in steps)
    return Summary(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        device=torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
        dtype=str(setup.dtype).removeprefix("torch."),
        products=_products(setup),
        base=BaseSummary(
            name=base.checkpoint.name,
            commit=base.checkpoint.commit,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            quantized=base.bits,
            parameters=setup.footprint.parameters,
            bytes=setup.footprint.bytes,
        ),
        data=DataSummary(
            path=recipe.data.path,
            fingerprint=data.fingerprint,
            template=data.template.name,
            **dataclasses.asdict(data.counts),
        ),
        adapter=AdapterSummary(targets=targets_of(setup.model), trainable_parameters=setup.trained_parameters),
        steps=recorder.steps,
        processes=recipe.train.processes,
        micro_batch=recipe.train.micro_batch,
        halved_from=first,
        learning_rate=recipe.train.peak_rate,
        learning_rate_reason=found.reason if (found := recorder.run.found_rate()) is not None else None,
        train_loss=next(entry["loss"] for entry in reversed(history) if "loss" in entry),
        validation_loss=LossSummary(before=losses[0], kept=losses[recorder.kept_step]) if losses else None,
        kept_step=recorder.kept_step,
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        seconds_in_steps=round(seconds, 1),
        peak_memory_gb=round(taken["peak_memory"] / 1e9, 3),
        memory=setup.memory.compare(int(taken["peak_memory"])) if setup.memory is not None and is_first else None,
        seconds=taken["seconds"],
    )


def paths_in(folder: pathlib.Path) -> frozenset[pathlib.Path]:
    """All paths in a folder, relative to it."""
    return frozenset(path.relative_to(folder) for path in folder.rglob("*"))


def foreign_files(run: Run, made: Collection[pathlib.Path]) -> list[pathlib.Path]:
    """Paths in a run folder that neither existed before training nor were written by it.

    Args:
        run: a run without a checkpoint.
        made: the paths before training.
    """
    new = paths_in(run.folder) - set(made)
    return sorted(path for path in new if path.parts[0] not in WRITTEN_BY_TRAINING and not path.name.startswith("."))
