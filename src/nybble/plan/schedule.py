"""How many optimiser steps a run takes, and what happens when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.errors import RecipeError, TooFewRowsError
from nybble.recipe import TrainOptions

EVALUATIONS = 5  # over a run, where the recipe does not say: enough for a curve


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps there are, and what happens when."""

    steps: int
    evaluate_every: int
    save_every: int


def plan_steps(train: TrainOptions, rows: int | None, has_validation: bool) -> Schedule:
    """Count steps as Trainer does.

    Args:
        train: the recipe's train section.
        rows: rows of the training set (packed rows where it is packed); None of a stream, which has no end.
        has_validation: whether there is anything to evaluate on.

    Raises:
        TooFewRowsError: fewer rows than one step takes.
        RecipeError: checkpoints that would miss the evaluations whose best is to be kept.
    """
    batch = train.micro_batch * train.accumulation * train.processes
    if rows is None:
        assert train.max_steps is not None, "a recipe that streams has max_steps"
        rows = batch
    if rows < batch:
        raise TooFewRowsError(
            f"the data gives {rows} training rows, and one step takes {batch} "
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
            "adapter might not be among the saved",
            fix=f"train.save_every={evaluate_every}, or train.keep_best=false",
        )
    return Schedule(steps, evaluate_every, save_every)
