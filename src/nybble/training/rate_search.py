"""train.learning_rate=auto: one short run in which the rate rises, on an adapter that is put back as it was."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from nybble.data.batches import Collator
from nybble.data.order import GroupedByLength, lengths_of
from nybble.data.sets.stream import StreamedRows
from nybble.distributed.group import broadcast
from nybble.objective.supervised import Supervised
from nybble.recipe.options.rate import AUTO
from nybble.run.rate import FoundRate
from nybble.terminal import tell
from nybble.training.optimizer import make_optimizer
from nybble.training.preparation import TrainingSetup
from nybble.training.rate_curve import rising_losses
from nybble.training.rate_rule import suggest

LOWEST, HIGHEST = 1e-5, 0.1
PER_DECADE = 12
COUNT = round(PER_DECADE * 4) + 1  # of rates between them


def with_rate(setup: TrainingSetup, console: Console) -> tuple[TrainingSetup, FoundRate | None]:
    """A run with its learning rate as a number, and how that was found; None if the recipe names it.

    Raises:
        TrainingError: the loss did not fall at any rate.
    """
    if setup.recipe.train.learning_rate != AUTO:
        return setup, None
    found = search_rate(setup, console)
    tell(console, f"rate      {found.rate:g}: {found.reason}", hang=10)
    train = setup.recipe.train.model_copy(update={"learning_rate": found.rate})
    return dataclasses.replace(setup, recipe=setup.recipe.model_copy(update={"train": train})), found


def search_rate(setup: TrainingSetup, console: Console) -> FoundRate:
    """Train on the run's own rows at a rate that rises with every step from LOWEST until the loss diverges; choose by the curve.

    The adapter, and the state of torch's random numbers, are afterwards what they were. Of several processes each does the same.

    Args:
        setup: a run with a new adapter.
        console: shows how far it is.

    Raises:
        TrainingError: the loss did not fall at any rate.
    """
    rates = [LOWEST * (HIGHEST / LOWEST) ** (number / (COUNT - 1)) for number in range(COUNT)]
    train = setup.recipe.train
    trained = {name: parameter for name, parameter in setup.model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices), console.status("searching the learning rate") as status:
        steps = list(_steps(setup, COUNT))  # the loader draws a number too

        def show(done: int) -> None:
            what = f"untrained, step {done + 1} of {len(steps)}"
            if done >= len(steps):
                what = f"rate {done - len(steps) + 1} of at most {len(steps)}"
            status.update(f"searching the learning rate: {what}")

        setup.model.train()
        checkpointing = _recompute(setup)
        optimizer = make_optimizer(setup.model, train.optimizer, setup.dtype, rates[0], train.weight_decay)
        try:
            points = list(rising_losses(
                setup.model, Supervised(), steps, optimizer, rates, setup.dtype, train.max_grad_norm, show
            ))  # fmt: skip
        finally:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.grad = None
                    parameter.copy_(before[name])
            if checkpointing:
                setup.model.gradient_checkpointing_disable()
    return broadcast(suggest(points))


def _recompute(setup: TrainingSetup) -> bool:
    """Recompute activations where training will, and Transformers computes the layers; returns whether it does."""
    fused = setup.fusion is not None and not setup.fusion.fallen_back
    if fused or not setup.recipe.train.gradient_checkpointing:
        return False
    setup.model.gradient_checkpointing_enable({"use_reentrant": False})
    return True


def _steps(setup: TrainingSetup, count: int) -> Iterator[list[dict[str, Any]]]:
    """The first steps' micro batches, in the order of the run; a small data set is passed over as often as needed."""
    train, rows = setup.recipe.train, setup.data.train
    fused = setup.fusion is not None and not setup.fusion.fallen_back
    per_step = train.micro_batch * train.accumulation * train.processes
    order = None if isinstance(rows, StreamedRows) else GroupedByLength(lengths_of(rows), per_step, train.seed)
    collate = Collator(setup.tokenizer.pad_token_id, flatten=fused)
    loader = DataLoader(rows, batch_size=train.micro_batch, sampler=order, collate_fn=collate)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(count):
        yield list(itertools.islice(batches, train.accumulation * train.processes))
