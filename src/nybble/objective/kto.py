"""Preference training on single answers that are good or bad (KTO, Ethayarajh et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.distributed.group import all_reduce
from nybble.objective.likelihood import answer_likelihoods
from nybble.objective.objective import Mean, MetricMeans, MicroBatch, StepLoss
from nybble.objective.preference import reference_likelihoods, unwrapped, without_adapter


def kto(rewards: torch.Tensor, is_good: torch.Tensor, kl: torch.Tensor, good: float, bad: float) -> torch.Tensor:
    """Each answer's loss: weight (1 - sigmoid(±(r - z))), where z = beta KL, with + for good answers (equation 8).

    Args:
        rewards: (n,) beta (log p - log p_reference).
        is_good: (n,) labels.
        kl: scalar z.
        good: weight of good answers.
        bad: weight of bad ones.
    """
    sign, weight = (torch.where(is_good, one, other).to(rewards) for one, other in ((1.0, -1.0), (good, bad)))
    return weight * (1 - torch.sigmoid(sign * (rewards - kl)))


@dataclass(frozen=True)
class Kto:
    """The mean over the answers of a step.

    z is estimated from the answers of a micro batch after other prompts, over all processes, and never below 0; it is 0 for a row
    that is alone.

    Args:
        beta: strength.
        good: weight of good answers.
        bad: weight of bad ones.
    """

    beta: float
    good: float = 1.0
    bad: float = 1.0
    metrics: Sequence[str] = (
        *("accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "change_chosen", "kl"),
    )

    def count(self, batch: MicroBatch) -> int:
        """Answers."""
        return int(batch["rows"])

    def loss(self, model: torch.nn.Module, batch: MicroBatch, count: torch.Tensor) -> StepLoss:
        """The micro batch's share of the step's mean."""
        total, answers = all_reduce(self._divergence(model, batch))
        losses, metrics = self._measured(model, batch, total / answers.clamp(min=1))
        return StepLoss(losses.sum() / count, metrics)

    def measure(self, model: torch.nn.Module, batch: MicroBatch) -> MetricMeans:
        """The loss and all metrics; z is that of the batch alone, since processes may have different numbers of batches."""
        total, answers = self._divergence(model, batch)
        losses, metrics = self._measured(model, batch, total / answers.clamp(min=1))
        return {"loss": Mean(losses.sum(), batch["rows"]), **metrics}

    def _divergence(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The change of mismatched answers' log-likelihoods in nats, summed, and their number: (2,)."""
        mismatched = batch["mismatched"]
        with without_adapter(model) as base:
            reference = answer_likelihoods(base, mismatched)[:-1]
        with torch.no_grad():
            changes = answer_likelihoods(unwrapped(model), mismatched)[:-1] - reference
        return torch.stack([changes.sum(), changes.new_full((), len(changes))])

    def _measured(
        self, model: torch.nn.Module, batch: MicroBatch, kl: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Mean]]:
        """Each answer's loss, and the metrics; accuracy is the share of good answers above z and bad ones below."""
        reference = reference_likelihoods(model, batch)
        sums = answer_likelihoods(model, batch)[:-1]
        kl, is_good = kl.clamp(min=0), batch["is_good"]
        rewards = self.beta * (sums - reference)
        losses = kto(rewards, is_good, self.beta * kl, self.good, self.bad)
        return losses, self._metrics(batch, sums.detach(), rewards.detach(), kl)

    def _metrics(
        self, batch: MicroBatch, sums: torch.Tensor, rewards: torch.Tensor, kl: torch.Tensor
    ) -> dict[str, Mean]:
        is_good, rows = batch["is_good"], batch["rows"]
        good, bad = is_good.float(), (~is_good).float()
        above = rewards - self.beta * kl
        right = torch.where(is_good, above > 0, above < 0).float() + 0.5 * (above == 0).float()
        changes = rewards / self.beta / batch["answer_tokens"].clamp(min=1)
        return {
            "accuracy": Mean(right.sum(), rows),
            "reward_chosen": Mean((rewards * good).sum(), good.sum()),
            "reward_rejected": Mean((rewards * bad).sum(), bad.sum()),
            "logp_chosen": Mean((sums * good).sum(), good.sum()),
            "logp_rejected": Mean((sums * bad).sum(), bad.sum()),
            "change_chosen": Mean((changes * good).sum(), good.sum()),
            "kl": Mean(kl * rows, rows),
        }
