"""A run whose micro batch does not fit in the GPU's memory is trained with a smaller one, once, from its last checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from nybble.distributed.group import group_size
from nybble.evaluate.scores import Benchmarks
from nybble.plan.schedule import smaller_micro_batch
from nybble.recipe import Recipe
from nybble.run.folder import Run, change_recipe
from nybble.terminal import tell
from nybble.training.checkpoints import Resumption, resumption
from nybble.training.shared_parts import free_memory


@dataclass(frozen=True)
class Halved:
    """A run that ran out of memory and can be trained with a smaller micro batch."""

    run: Run
    """The run with the new recipe, which its folder records."""
    made: frozenset[pathlib.Path] | None
    """The paths in the folder before training; None if this process did not create the folder."""


Attempt = Callable[[Recipe, Resumption | None, frozenset[pathlib.Path] | None], Run | Halved]
"""Trains a recipe, perhaps from a checkpoint; its third argument is that of `Halved.made`."""


def train_or_halve(attempt: Attempt, recipe: Recipe, resumed: Resumption | None, benchmarks: Benchmarks | None) -> Run:
    """Train; if that ends with a smaller micro batch, resume the run with it, as `nybble train --resume` does.

    Everything is loaded again. A model in which an error interrupted a step may be left with gradients, hooks, wrapped methods
    and half-written buffers; that one which is loaded again ends as if nothing had happened, the tests of killed runs show.

    Args:
        attempt: trains once.
        recipe: the recipe of the first attempt.
        resumed: the checkpoint of the first attempt.
        benchmarks: those of the run; their batches become as small as the micro batch.
    """
    result = attempt(recipe, resumed, None)
    if isinstance(result, Halved):
        free_memory()
        if benchmarks is not None:
            benchmarks.batch = result.run.recipe.train.micro_batch
        result = attempt(result.run.recipe, resumption(result.run), result.made)
    assert isinstance(result, Run), "a run is halved once"
    return result


def halve(run: Run, made: frozenset[pathlib.Path] | None, first: int | None, console: Console) -> Halved | None:
    """Record a smaller micro batch in a run that ran out of memory, and say so.

    None if there is no smaller one, or the run has had a smaller one before; and with several processes: one that has run out of
    memory cannot tell the others, which wait for it in the middle of an exchange.

    Args:
        run: the run.
        made: as `Halved.made`.
        first: the larger micro batch that the run was started with; None if it still has its first.
        console: prints the notice.
    """
    train = run.recipe.train
    smaller = smaller_micro_batch(train.micro_batch, train.accumulation)
    if smaller is None or group_size() > 1 or first is not None:
        return None
    micro_batch, accumulation = smaller
    tell(
        console,
        f"memory    micro batch {train.micro_batch} did not fit: continuing with {micro_batch}, "
        f"accumulation {train.accumulation} -> {accumulation} (the same step)",
    )
    changed = train.model_copy(update={"micro_batch": micro_batch, "accumulation": accumulation})
    return Halved(change_recipe(run, run.recipe.model_copy(update={"train": changed})), made)
