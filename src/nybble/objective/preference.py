"""Preference training on pairs: a chosen answer becomes more likely than a rejected one (DPO, ORPO, SimPO)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel

from nybble.objective.likelihood import answer_likelihoods
from nybble.objective.objective import Mean, Measure, MetricMeans, MicroBatch, StepLoss

PairLoss = Literal["dpo", "orpo", "simpo"]


@dataclass(frozen=True)
class Pairs:
    """The likelihoods of a batch's n pairs, in nats; each (n,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    reference_chosen: torch.Tensor
    """Zero for an objective without a reference."""
    reference_rejected: torch.Tensor


@dataclass(frozen=True)
class Rewards:
    """What an objective gives each answer of n pairs, and its loss; each (n,)."""

    losses: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


def dpo(pairs: Pairs, beta: float) -> Rewards:
    """Direct preference optimisation: -log sigmoid(r_chosen - r_rejected), where r = beta (log p - log p_reference) (Rafailov et
    al. 2023, equation 7)."""
    chosen = beta * (pairs.chosen - pairs.reference_chosen)
    rejected = beta * (pairs.rejected - pairs.reference_rejected)
    return Rewards(-torch.nn.functional.logsigmoid(chosen - rejected), chosen, rejected)


def simpo(pairs: Pairs, beta: float, gamma: float) -> Rewards:
    """-log sigmoid(r_chosen - r_rejected - gamma), where r = beta log p / tokens (Meng et al. 2024, equation 6)."""
    chosen, rejected = beta * pairs.chosen / pairs.chosen_tokens, beta * pairs.rejected / pairs.rejected_tokens
    return Rewards(-torch.nn.functional.logsigmoid(chosen - rejected - gamma), chosen, rejected)


def odds_ratio(pairs: Pairs, beta: float) -> Rewards:
    """ORPO's penalty, -beta log sigmoid(log odds_chosen - log odds_rejected), where odds = P / (1 - P) and log P is the mean
    log-likelihood of an answer's tokens (Hong et al. 2024, equation 7). It is added to the loss of the chosen answers."""
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    log_odds = (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))
    return Rewards(-beta * torch.nn.functional.logsigmoid(log_odds), beta * chosen, beta * rejected)


def _log_of_rest(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler 2012)."""
    log_p = log_p.clamp(max=-1e-7)  # an answer that is certain would have infinite odds
    return torch.where(log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


@dataclass(frozen=True)
class PairObjective:
    """The mean over the pairs of a step; ORPO adds the mean over the tokens of its chosen answers.

    Args:
        name: the objective.
        beta: its strength.
        gamma: SimPO's margin.
    """

    name: PairLoss
    beta: float
    gamma: float = 0.0

    @property
    def metrics(self) -> Sequence[str]:
        """What is measured: each is a mean over pairs."""
        always = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
        return (*always, "change_chosen", "kl") if self.name == "dpo" else always

    def count(self, batch: MicroBatch) -> int | tuple[int, ...]:
        """Pairs; for ORPO also the chosen answers' tokens."""
        return (batch["rows"], _imitated_tokens(batch)) if self.name == "orpo" else int(batch["rows"])

    def loss(self, model: torch.nn.Module, batch: MicroBatch, count: torch.Tensor) -> StepLoss:
        """The micro batch's share of the step's mean."""
        parts, metrics = self._measured(model, batch)
        counts = count.unbind() if count.ndim else (count,)
        loss = torch.stack([part.total / number for part, number in zip(parts, counts, strict=True)]).sum()
        return StepLoss(loss, metrics)

    def measure(self, model: torch.nn.Module, batch: MicroBatch) -> MetricMeans:
        """The loss and all metrics."""
        parts, metrics = self._measured(model, batch)
        return {"loss": parts[0] if len(parts) == 1 else (parts[0], parts[1]), **metrics}

    def _measured(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[list[Mean], dict[str, Measure]]:
        """The means whose sum is the loss, and the metrics."""
        pairs, prompts = self._pairs(model, batch)
        if self.name == "dpo":
            rewards = dpo(pairs, self.beta)
        elif self.name == "simpo":
            rewards = simpo(pairs, self.beta, self.gamma)
        else:
            rewards = odds_ratio(pairs, self.beta)
        parts = [Mean(rewards.losses.sum(), batch["rows"])]
        if self.name == "orpo":
            parts.append(Mean(-(pairs.chosen.sum() + prompts), _imitated_tokens(batch)))
        with torch.no_grad():
            terms = pair_metrics(pairs, rewards)
        return parts, {name: Mean(terms[name].sum(), batch["rows"]) for name in self.metrics}

    def _pairs(self, model: torch.nn.Module, batch: MicroBatch) -> tuple[Pairs, torch.Tensor]:
        """The pairs' likelihoods, and that of trained tokens of prompts."""
        needs_reference = self.name == "dpo"
        reference = reference_likelihoods(model, batch) if needs_reference else None
        sums = answer_likelihoods(model, batch)
        answers = sums[:-1]
        if reference is None:
            reference = torch.zeros_like(answers)
        tokens = batch["answer_tokens"]
        return Pairs(*answers.chunk(2), *tokens.chunk(2), *reference.chunk(2)) if len(answers) else _none(sums), sums[
            -1
        ]


def pair_metrics(pairs: Pairs, rewards: Rewards) -> dict[str, torch.Tensor]:
    """What is told of each pair; equal rewards count as half right."""
    margins = rewards.chosen - rewards.rejected
    changes = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    return {
        "accuracy": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "margin": margins,
        "reward_chosen": rewards.chosen,
        "reward_rejected": rewards.rejected,
        "logp_chosen": pairs.chosen,
        "logp_rejected": pairs.rejected,
        "change_chosen": changes[0] / pairs.chosen_tokens.clamp(min=1),
        "kl": (changes[0] + changes[1]) / 2,
    }


def reference_likelihoods(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The log-likelihoods of a batch's answers under the reference, (a,): those that the batch has, or those of the model without
    its adapter."""
    if (known := batch.get("reference")) is not None:
        return known  # type: ignore[no-any-return]
    with without_adapter(model) as base:
        return answer_likelihoods(base, batch)[:-1]


@contextlib.contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model without wrapper, adapter and gradients."""
    inner = unwrapped(model)
    assert isinstance(inner, PeftModel), "a reference is a base without its adapter"
    with torch.no_grad(), inner.disable_adapter():
        yield inner


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model without DistributedDataParallel, which expects a backward after each of its forwards."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def _imitated_tokens(batch: MicroBatch) -> int:
    """How many tokens of chosen answers, and of their prompts if those are trained, a batch has."""
    return int(batch["imitated"])


def _none(sums: torch.Tensor) -> Pairs:
    """No pairs, in a graph that reaches the model: every process takes part in every backward."""
    return Pairs(*[sums[:0]] * 6)
