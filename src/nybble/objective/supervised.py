"""Supervised fine-tuning: mean cross-entropy over the trained tokens, which all count the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.objective.likelihood import summed_loss
from nybble.objective.objective import Mean, MetricMeans, MicroBatch, StepLoss


class Supervised:
    """Cross-entropy in nats per trained token of the whole step, however it is split into micro batches and processes."""

    metrics: Sequence[str] = ()

    def count(self, batch: MicroBatch) -> int:
        """Trained tokens."""
        return len(batch["predicting"])

    def loss(self, model: torch.nn.Module, batch: MicroBatch, count: torch.Tensor) -> StepLoss:
        """The micro batch's share of the step's mean."""
        return StepLoss(summed_loss(model, batch) * (1 / count))

    def measure(self, model: torch.nn.Module, batch: MicroBatch) -> MetricMeans:
        """Nats per trained token."""
        return {"loss": Mean(summed_loss(model, batch), len(batch["predicting"]))}
