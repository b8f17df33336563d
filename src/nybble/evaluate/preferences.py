"""Which of two held-out answers base and tuned model prefer, and whether they prefer longer ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

from nybble.data.batches import Sample
from nybble.data.judged_batches import JudgedCollator
from nybble.data.order import batches
from nybble.evaluate.results import metric_entry, score_entry
from nybble.objective.likelihood import MEASURED_TOKENS, answer_likelihoods
from nybble.run.evaluation import PREFERENCE_METRICS, MetricEntry, PreferenceEntry

PER_TOKEN = ("orpo", "simpo")  # objectives that compare the mean log-likelihood of an answer's tokens, not the sum


@dataclass(frozen=True)
class PairLikelihoods:
    """Log-likelihoods of pairs in nats, and their answers' tokens; each (pairs, 2), chosen first."""

    sums: numpy.ndarray
    tokens: numpy.ndarray

    def preferred(self, scores: numpy.ndarray) -> numpy.ndarray:
        """1 for each pair whose chosen answer has the higher score, 0.5 for equal scores, else 0: (pairs,)."""
        signs: numpy.ndarray = numpy.sign(scores[:, 0] - scores[:, 1])
        return (signs + 1) / 2

    def scores(self, objective: str) -> numpy.ndarray:
        """What an objective compares: sums or means of the tokens' log-likelihoods."""
        return self.sums / self.tokens if objective in PER_TOKEN else self.sums


def pair_likelihoods(
    model: torch.nn.Module, rows: Sequence[Sample], pad_id: int, progress: Callable[[int], None] = lambda _: None
) -> PairLikelihoods:
    """The likelihoods of pairs under a model in evaluation mode.

    Args:
        model: on its device.
        rows: pairs, as `nybble.data.sets` prepares them.
        pad_id: any id; nothing attends to it.
        progress: called with the number of pairs done.
    """
    collate, device = JudgedCollator(pad_id), next(model.parameters()).device
    sums, tokens = (numpy.zeros((len(rows), 2)) for _ in range(2))
    done = 0
    for members in batches([row["length"] for row in rows], MEASURED_TOKENS):
        batch = collate([rows[member] for member in members])
        moved = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
        with torch.no_grad():
            found = answer_likelihoods(model, moved)[:-1]
        sums[members] = found.double().cpu().numpy().reshape(2, -1).T
        tokens[members] = batch["answer_tokens"].numpy().reshape(2, -1).T
        done += len(members)
        progress(done)
    return PairLikelihoods(sums, tokens)


def preference_entry(base: PairLikelihoods, tuned: PairLikelihoods, objective: str) -> PreferenceEntry:
    """How often each model prefers the chosen answer, and how often the longer one; pairs of equal length have none.

    Args:
        base, tuned: the same pairs.
        objective: the run's.
    """
    models = (base, tuned)
    right = [each.preferred(each.scores(objective)) for each in models]
    accuracy = metric_entry(PREFERENCE_METRICS[0], *(each.tolist() for each in right))
    sizes = base.tokens[:, 0] - base.tokens[:, 1]
    unequal = sizes != 0
    chosen_is_longer = (sizes > 0).astype(float)[unequal]
    longer = [numpy.where(sizes > 0, each, 1 - each)[unequal] for each in right]
    bias = [score_entry(each) for each in (*longer, chosen_is_longer)]
    return PreferenceEntry(
        rows=len(base.sums),
        by="mean log-likelihood per token" if objective in PER_TOKEN else "log-likelihood",
        metrics=[accuracy, MetricEntry(name=PREFERENCE_METRICS[1], base=bias[0], tuned=bias[1])],
        longer_chosen=bias[2],
        reward_accuracy=score_entry(tuned.preferred(tuned.sums - base.sums)) if objective == "dpo" else None,
    )
