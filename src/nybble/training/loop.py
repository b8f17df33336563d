"""The training of a prepared run, from the first step to the last: objective, optimiser, trainer and callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from nybble.data.batches import Collator, FilledRows
from nybble.data.judged_batches import JudgedCollator, collator_for, good_rows
from nybble.data.sets.stream import StreamedRows
from nybble.distributed.group import broadcast, group_size, share_of
from nybble.engine.fusion import uneven_passes
from nybble.evaluate.curve import TaskScores
from nybble.evaluate.scores import Benchmarks
from nybble.objective.choice import choose_objective
from nybble.objective.likelihood import MEASURED_TOKENS, bare, is_plain
from nybble.recipe.options.recipe import REFERRING
from nybble.run.folder import Run
from nybble.terminal import tell
from nybble.training.arguments import training_arguments
from nybble.training.checkpoints import Resumption, prepare_resumption, processes_of
from nybble.training.guards import Guards
from nybble.training.interrupt import Interruption
from nybble.training.optimizer import make_optimizer
from nybble.training.preparation import TrainingSetup
from nybble.training.progress import EVALUATING, SAMPLING, SCORING, RunProgress
from nybble.training.recorder import Recorder, SampleAnswering
from nybble.training.reference import kept_reference
from nybble.training.rehearsal import Rehearsal
from nybble.training.resource_use import ResourceUse
from nybble.training.samples import SampleAnswers
from nybble.training.trackers import tracking
from nybble.training.trainer import QLoraTrainer
from nybble.training.watching import Watch, Watcher


def run_trainer(
    run: Run, setup: TrainingSetup, resumed: Resumption | None, console: Console, benchmarks: Benchmarks | None,
    interruption: Interruption, used: ResourceUse, watch: Watch | None,
) -> Recorder:  # fmt: skip
    """Train to the end of the schedule; returns the recorder.

    Raises:
        Stopped: a signal ended it, and a checkpoint was saved.
        TrainingError: a loss or a gradient is wrong.
    """
    recipe = setup.recipe
    fused = setup.fusion is not None and not setup.fusion.fallen_back
    arguments = training_arguments(
        recipe, run.folder, setup.schedule, setup.device, setup.dtype, setup.data.validation is not None,
        checkpointing=recipe.train.gradient_checkpointing and not fused,
    )  # fmt: skip
    checkpoint = _resume_from(resumed, arguments, setup, console)
    is_first = arguments.should_save  # only the first process reports to the tracker
    with tracking(recipe.tracker, run.folder, recipe.model_dump()) if is_first else contextlib.nullcontext() as notice:
        if notice:
            tell(console, f"tracker   {notice}")
        trainer = _make_trainer(setup, arguments, fused, benchmarks, console)
        recorder = _add_callbacks(trainer, run, setup, console, interruption, used, watch)
        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            recorder.progress.stop()
    interruption.raise_if_stopped()
    recorder.steps, recorder.history = trainer.state.global_step, trainer.state.log_history
    is_best = arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    # Another machine may not have the best checkpoint's folder.
    recorder.kept_step = broadcast(trainer.state.best_global_step if is_best else recorder.steps)
    return recorder


def _resume_from(
    resumed: Resumption | None, arguments: TrainingArguments, setup: TrainingSetup, console: Console
) -> pathlib.Path | None:
    """The checkpoint to load; first removes what a killed run left after it."""
    if resumed is None:
        return None
    checkpoint = resumed.checkpoint
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    for notice in prepare_resumption(resumed) if arguments.should_save else ():
        tell(console, f"          {notice}", hang=10)
    tell(console, f"          resuming from {checkpoint.name if checkpoint else 'the beginning'}")
    if checkpoint is not None and processes_of(checkpoint) != arguments.world_size and _draws_numbers(setup):
        what = "dropout and noise continue with other random numbers, since each process has its own"
        tell(console, f"          {what}: losses will differ a little from those of an uninterrupted run")
    return checkpoint


def _draws_numbers(setup: TrainingSetup) -> bool:
    """Whether the steps of a run depend on random numbers."""
    return bool(setup.model.peft_config["default"].lora_dropout or setup.recipe.train.neftune_alpha)


def _make_trainer(
    setup: TrainingSetup, arguments: TrainingArguments, fused: bool, benchmarks: Benchmarks | None, console: Console
) -> QLoraTrainer:
    recipe, train, rows = setup.recipe, setup.recipe.train, setup.data.train
    trainer = QLoraTrainer(
        objective=choose_objective(train.objective, recipe.preference),
        optimizer=make_optimizer(setup.model, train.optimizer, setup.dtype, train.peak_rate, train.weight_decay),
        model=setup.model,
        args=arguments,
        train_dataset=FilledRows(rows) if group_size() > 1 and not isinstance(rows, StreamedRows) else rows,
        eval_dataset=setup.data.validation,
        data_collator=_collator(setup, fused, console),
        processing_class=setup.tokenizer,
    )
    if is_plain(bare(setup.model).get_output_embeddings()):  # many short rows share a batch, as in `nybble eval`
        trainer.eval_tokens = min(train.micro_batch * recipe.data.max_length, MEASURED_TOKENS)
    if benchmarks is not None and train.eval_tasks:
        trainer.task_scores = TaskScores(benchmarks, train.eval_tasks, setup.model, setup.tokenizer, setup.dtype)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _collator(setup: TrainingSetup, fused: bool, console: Console) -> Collator | JudgedCollator:
    """Makes batches of rows; with a reference that is kept, its likelihoods are computed now."""
    recipe, pad_id = setup.recipe, setup.tokenizer.pad_token_id
    shares = setup.fusion is not None and setup.fusion.shares_prompts
    collate = collator_for(recipe.train.objective, pad_id, flatten=fused, shares_prompts=shares)
    is_kept = recipe.preference.reference == "kept" and recipe.train.objective in REFERRING
    if isinstance(collate, Collator) or not is_kept:
        return collate
    return dataclasses.replace(collate, reference=kept_reference(setup, collate, console))


def _add_callbacks(
    trainer: QLoraTrainer, run: Run, setup: TrainingSetup, console: Console, interruption: Interruption,
    used: ResourceUse, watch: Watch | None,
) -> Recorder:  # fmt: skip
    """Give the trainer its callbacks; returns the one that records."""
    train, answers = setup.recipe.train, _answers(setup)
    kinds = {
        EVALUATING: setup.data.validation is not None,
        SCORING: trainer.task_scores is not None,
        SAMPLING: answers is not None,
    }
    progress = RunProgress(console, setup.schedule, frozenset(what for what, happens in kinds.items() if happens))
    trainer.show_activity = progress.activity
    step, metrics = trainer.current_step, trainer.objective.metrics
    recorder = Recorder(run, step, metrics, console, progress, answers, setup.recipe.tracker.to)
    evaluate = trainer.try_evaluation if setup.data.validation is not None else None
    trainer.add_callback(Rehearsal(evaluate, progress.activity))  # before the recorder starts to time the second step
    trainer.add_callback(recorder)
    trainer.add_callback(Guards(run, step, used))
    if train.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(train.early_stopping))
    if watch is not None:
        trainer.add_callback(Watcher(watch))
    trainer.add_callback(interruption)  # last, after the callbacks that end a run normally
    return recorder


def _answers(setup: TrainingSetup) -> SampleAnswering | None:
    """Answers this process's share of the sample prompts; None if no process has any."""
    rows = good_rows(setup.data.validation) if setup.data.validation is not None else None
    count = min(setup.recipe.train.samples, len(rows)) if rows is not None else 0
    if rows is None or not count:
        return None
    share = share_of(count)
    answers = SampleAnswers(
        setup.model, setup.tokenizer, setup.data.template.ends, rows.select(share), len(share), setup.dtype, setup.cache
    )

    def answered(show: Callable[[int, int], None]) -> list[dict[str, Any]]:
        with uneven_passes(setup.model):
            return answers(show) if share else []  # none if there are more processes than prompts

    return answered
