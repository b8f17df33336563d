"""How many optimiser steps a run takes, and what happens when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.errors import RecipeError, TooFewRowsError
from nybble.recipe import TrainOptions

EVALUATIONS = 5  # over a run, unless the recipe says otherwise: enough for a curve
FEW_STEPS, ENOUGH_STEPS = 20, 60  # five teach SmolLM2 nothing, sixty do (docs/quickstart.md)
SHORTENED = 10  # a warm-up that would cover the whole run is shortened to a tenth of the steps


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps there are, and what happens when."""

    steps: int
    evaluate_every: int
    save_every: int
    warmup: int
    """Steps before the learning rate reaches its peak; in the first step it is 0."""
    notice: str = ""
    """Says what in the recipe could not be applied as written; empty if nothing."""

    def evaluations_after(self, step: int) -> int:
        """Evaluations that follow those of a step; there is always one at the last step."""
        return _remaining(self.evaluate_every, self.steps, step)

    def saves_after(self, step: int) -> int:
        """Checkpoints that follow that of a step; there is always one at the last step."""
        return _remaining(self.save_every, self.steps, step)


def steps_text(steps: int, train: TrainOptions) -> str:
    """The number of steps and the size of each, as text."""
    rows = train.micro_batch * train.accumulation * train.processes
    processes = f", {train.processes} processes" if train.processes > 1 else ""
    return (
        f"{steps:,} step{'s' * (steps != 1)} of {rows:,} row{'s' * (rows != 1)} "
        f"(micro batch {train.micro_batch}, accumulation {train.accumulation}{processes})"
    )


def few_steps_notice(train: TrainOptions, steps: int) -> str:
    """What to say of a run of fewer than FEW_STEPS that nobody asked for; nothing of others."""
    if steps >= FEW_STEPS or train.max_steps is not None:
        return ""
    passes = f"more passes (train.epochs={math.ceil(ENOUGH_STEPS * train.epochs / steps)})"
    smaller = f"a step every {train.micro_batch * train.processes} rows (train.accumulation=1), or "
    return f"{steps} step{'s' * (steps != 1)} teach little: {smaller if train.accumulation > 1 else ''}{passes}"


def smaller_micro_batch(micro_batch: int, accumulation: int) -> tuple[int, int] | None:
    """The largest micro batch of at most half the rows that gives the same step, with its accumulation; None if there is none."""
    step = micro_batch * accumulation
    sizes = [size for size in range(1, micro_batch // 2 + 1) if step % size == 0]
    return (sizes[-1], step // sizes[-1]) if sizes else None


def split_among(train: TrainOptions, processes: int) -> tuple[int, int] | None:
    """The largest micro batch, up to the present one, that gives the same step on so many processes, with its accumulation; None
    if the rows of a step cannot be divided among them."""
    share, rest = divmod(train.micro_batch * train.accumulation * train.processes, processes)
    if rest:
        return None
    micro_batch = next(size for size in range(min(train.micro_batch, share), 0, -1) if share % size == 0)
    return micro_batch, share // micro_batch


def _remaining(every: int, steps: int, step: int) -> int:
    """How often an event that happens every `every` steps, and at the last step, still happens after a step."""
    return math.ceil(steps / every) - step // every if step < steps else 0


def plan_steps(train: TrainOptions, rows: int | None, has_validation: bool) -> Schedule:
    """Count the steps as Transformers' Trainer does.

    Args:
        train: the recipe's train section.
        rows: rows of the training set (packed rows if it is packed); None for a stream, which has no end.
        has_validation: whether there are validation rows.

    Raises:
        TooFewRowsError: there are fewer rows than one step takes.
        RecipeError: the best adapter is to be kept, but checkpoints would not coincide with evaluations.
    """
    batch = train.micro_batch * train.accumulation * train.processes
    if rows is None:
        assert train.max_steps is not None, "a recipe that streams has max_steps"
        rows = batch
    if rows < batch:
        raise TooFewRowsError(
            f"the data gives {rows} training rows, but one step takes {batch} "
            f"(micro_batch {train.micro_batch} x accumulation {train.accumulation} x processes {train.processes})",
            fix="train.micro_batch=1 train.accumulation=1, or more data",
        )
    micro_batches = math.ceil(rows / (train.micro_batch * train.processes))
    steps = train.max_steps or math.ceil(train.epochs * math.ceil(micro_batches / train.accumulation))
    evaluate_every = train.evaluate_every or max(1, math.ceil(steps / EVALUATIONS))
    save_every = train.save_every or evaluate_every
    if has_validation and train.keep_best and save_every != evaluate_every:
        raise RecipeError(
            f"train.save_every={save_every} differs from the {evaluate_every} steps between evaluations, so the best "
            "adapter might not be saved",
            fix=f"train.save_every={evaluate_every}, or train.keep_best=false",
        )
    return Schedule(steps, evaluate_every, save_every, *plan_warmup(train.warmup, steps))


def plan_warmup(requested: float, steps: int) -> tuple[int, str]:
    """Steps of warm-up, and a notice if the requested ones would cover the run, so that the peak rate would never be reached.

    Args:
        requested: train.warmup, a share of the steps (below 1) or a number of steps.
        steps: of the run.
    """
    warmup = int(requested) if requested >= 1 else math.ceil(steps * requested)
    if warmup < steps:
        return warmup, ""
    shorter = steps // SHORTENED
    covers = "the only step, whose learning rate would be 0" if steps == 1 else f"all {steps:,} steps"
    change = f"shortened to {shorter} step{'s' * (shorter > 1)}" if shorter else "left out"
    return shorter, f"train.warmup={requested:g} covers {covers}: the warm-up is {change}"
