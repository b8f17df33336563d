"""An objective: a loss over batches, how its mean over a step is taken, and what else it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nybble.distributed.group import all_reduce

MicroBatch = dict[str, Any]
"""What the collator returns, on the device."""


@dataclass(frozen=True)
class Mean:
    """A mean before the division: batches and processes are summed first, so that each term counts once."""

    total: torch.Tensor
    """Sum of the terms, a scalar."""
    count: torch.Tensor | int
    """How many terms there are."""


Measure = Mean | tuple[Mean, Mean]
"""A mean, or the sum of two means over different terms, such as tokens and pairs."""

MetricMeans = Mapping[str, Measure]


@dataclass(frozen=True)
class StepLoss:
    """The loss of a micro batch while training."""

    loss: torch.Tensor
    """Scalar to differentiate: the micro batch's share of the step's mean loss."""
    metrics: MetricMeans = field(default_factory=dict)
    """What else was measured, without gradients; the names are those of `Objective.metrics`."""


class Objective(Protocol):
    """What a model is trained towards. The training loop knows nothing else about it.

    An objective that needs a reference model computes it inside `loss` and `measure`, for example with the adapter disabled.
    """

    @property
    def metrics(self) -> Sequence[str]:
        """Names of what is measured besides the loss; the same in every process and for every batch."""
        ...

    def count(self, batch: MicroBatch) -> int | tuple[int, ...]:
        """Terms that a batch contributes to the mean loss of its step, such as trained tokens or pairs; known on the host.
        A loss that is the sum of several means counts the terms of each."""
        ...

    def loss(self, model: torch.nn.Module, batch: MicroBatch, count: torch.Tensor) -> StepLoss:
        """The sum of a micro batch's loss terms, divided by `count`.

        Args:
            model: in training mode, possibly wrapped in DistributedDataParallel.
            batch: a micro batch.
            count: scalar, or one number per mean: the terms of the whole step divided by the number of processes.
                DistributedDataParallel averages gradients over processes, and the result must be the mean over all terms.
        """
        ...

    def measure(self, model: torch.nn.Module, batch: MicroBatch) -> MetricMeans:
        """The mean loss of validation rows, under the name `loss`, and all `metrics`; called without gradients."""
        ...


class MetricSums:
    """Means over batches and processes.

    Args:
        names: what is measured, in the same order in every process; a process without a batch takes part too.
        device: the device of the batches.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(len(names), 2, 2, dtype=torch.float64, device=device)  # up to two means each

    def add(self, metrics: MetricMeans) -> None:
        """Count a batch, without waiting for the device."""
        for index, name in enumerate(self._names):
            measure = metrics[name]
            for part, mean in enumerate(measure if isinstance(measure, tuple) else (measure,)):
                self._sums[index, part, 0] += mean.total
                self._sums[index, part, 1] += mean.count

    def wait(self) -> None:
        """Wait until the device has computed what was added."""
        self._sums.sum().item()

    def means(self) -> dict[str, float]:
        """Each mean over everything that was added in any process; NaN where nothing was."""
        sums = all_reduce(self._sums).tolist()
        means = ([total / count for total, count in parts if count] for parts in sums)
        return {name: sum(each) if each else float("nan") for name, each in zip(self._names, means, strict=True)}
