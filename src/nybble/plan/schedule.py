"""How many optimiser steps a run takes, and what happens when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.errors import RecipeError, TooFewRowsError
from nybble.recipe import TrainOptions

EVALUATIONS = 5  # over a run, where the recipe does not say: enough for a curve
SHORTENED = 10  # of a warm-up that would cover a whole run, a tenth of the steps is left


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps there are, and what happens when."""

    steps: int
    evaluate_every: int
    save_every: int
    warmup: int
    """Steps before the learning rate reaches its peak; in the first of them it is 0."""
    notice: str = ""
    """What in the recipe could not be applied as written."""

    def evaluations_after(self, step: int) -> int:
        """Evaluations left after a step and its own; the last step always has one."""
        return _occasions(self.evaluate_every, self.steps, step)

    def saves_after(self, step: int) -> int:
        """Checkpoints left after a step and its own; the last step always has one."""
        return _occasions(self.save_every, self.steps, step)


def steps_text(steps: int, train: TrainOptions) -> str:
    """A number of steps and what each takes, for people to read."""
    rows = train.micro_batch * train.accumulation * train.processes
    processes = f", {train.processes} processes" if train.processes > 1 else ""
    return (
        f"{steps:,} step{'s' * (steps != 1)} of {rows:,} row{'s' * (rows != 1)} "
        f"(micro batch {train.micro_batch}, accumulation {train.accumulation}{processes})"
    )


def _occasions(every: int, steps: int, step: int) -> int:
    """How often something that happens every so many steps, and at the last, still happens after a step."""
    return math.ceil(steps / every) - step // every if step < steps else 0


def plan_steps(train: TrainOptions, rows: int | None, has_validation: bool) -> Schedule:
    """Count steps as Trainer does.

    Args:
        train: the recipe's train section.
        rows: rows of the training set (packed rows where it is packed); None of a stream, which has no end.
        has_validation: whether there is anything to evaluate on.

    Raises:
        TooFewRowsError: fewer rows than one step takes.
        RecipeError: checkpoints that would not coincide with the evaluations, of which the best is to be kept.
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


def plan_warmup(asked: float, steps: int) -> tuple[int, str]:
    """Steps of warm-up, and a notice where those asked for would be the whole run, so that the peak rate would never be reached.

    Args:
        asked: train.warmup, a share of the steps (below 1) or a number of steps.
        steps: of the run.
    """
    warmup = int(asked) if asked >= 1 else math.ceil(steps * asked)
    if warmup < steps:
        return warmup, ""
    shorter = steps // SHORTENED
    covers = "the only step, whose learning rate would be 0" if steps == 1 else f"all {steps:,} steps"
    what = f"shortened to {shorter} step{'s' * (shorter > 1)}" if shorter else "left out"
    return shorter, f"train.warmup={asked:g} covers {covers}: the warm-up is {what}"
