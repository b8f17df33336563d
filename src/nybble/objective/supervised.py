"""Supervised fine-tuning: mean cross-entropy over trained tokens, each of which counts the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.objective.likelihood import summed_loss
from nybble.objective.objective import Mean, MetricMeans, MicroBatch, StepLoss


class Supervised:
    """Cross-entropy in nats per trained token, over the whole step: how rows are split into micro batches and processes does
    not change it."""

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
