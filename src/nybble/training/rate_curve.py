"""The loss while the learning rate rises, step by step: what a rate is chosen by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nybble.objective.objective import MicroBatch
from nybble.objective.supervised import Supervised
from nybble.run.rate import RatePoint

Steps = Sequence[Sequence[MicroBatch]]
"""The micro batches of each step, on the host."""
DIVERGED = 1.0
"""Nats per token by which the loss of a step exceeds that of the untrained model on the same rows: the adapter is destroyed."""


def rising_losses(
    model: torch.nn.Module, objective: Supervised, steps: Steps, optimizer: torch.optim.Optimizer, rates: Sequence[float],
    dtype: torch.dtype, max_grad_norm: float, show: Callable[[int], None],
) -> Iterator[RatePoint]:  # fmt: skip
    """Train one step at each rate, until the loss diverges; the adapter is changed.

    Each loss is compared with that of the untrained model on the same rows, so that it does not matter which rows are hard: rows
    differ from each other by more than a step improves (a test of the learning rate's range, Smith 2015, on paired differences).

    Args:
        model: with a new adapter, in training mode.
        objective: what it is trained towards.
        steps: rows of each step; as many steps as rates.
        optimizer: over the adapter's parameters.
        rates: the learning rate of each step.
        dtype: the compute type.
        max_grad_norm: larger gradients are clipped.
        show: called with the number of passes over a step that are done; there are two for each step.
    """
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    computing = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    before = []
    for number, step in enumerate(steps):
        with torch.no_grad(), computing:
            before.append(_mean([objective.measure(model, _moved(batch, device))["loss"] for batch in step]))
        show(number)
    for number, (step, rate) in enumerate(zip(steps, rates, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(model, objective, step, optimizer, scaler, computing, max_grad_norm, device)
        show(len(steps) + number)
        if not math.isfinite(loss):
            return
        yield RatePoint(rate=rate, loss=loss, before=before[number], terms=sum(map(objective.count, step)))
        if loss - before[number] > DIVERGED:
            return


def _step(
    model: torch.nn.Module, objective: Supervised, step: Sequence[MicroBatch], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, computing: contextlib.AbstractContextManager[Any], max_grad_norm: float,
    device: torch.device,
) -> float:  # fmt: skip
    """One step of the optimiser; returns its loss, before the step."""
    count = torch.full((), sum(objective.count(batch) for batch in step), device=device)
    losses = []
    for batch in step:
        with computing:
            loss = objective.loss(model, _moved(batch, device), count).loss
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return float(torch.stack(losses).sum())


def _moved(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _mean(parts: Sequence[Any]) -> float:
    """The mean loss of a step from those of its micro batches."""
    return float(sum(part.total for part in parts) / sum(part.count for part in parts))
