"""Measured scores as the entries of evaluation.json: means with intervals, differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy

from nybble.evaluate.perplexity import Losses
from nybble.evaluate.scores import Scored
from nybble.evaluate.statistics import Estimate, PairedComparison, compare, holm, verdict
from nybble.run.evaluation import (
    ContaminationEntry,
    HeldOutEntry,
    LossEntry,
    MetricEntry,
    ScoreEntry,
    SubjectsEntry,
    TaskEntry,
)


class Tested(TypedDict):
    """The fields of a tested difference, which every entry has."""

    difference: ScoreEntry
    p: float
    p_adjusted: float
    verdict: str
    detectable: float | None


def task_entries(
    base: Sequence[Scored], tuned: Sequence[Scored], flagged: Mapping[str, Sequence[bool]]
) -> list[TaskEntry]:
    """One entry per benchmark; p-values are adjusted over all of them (Holm 1979).

    Args:
        base: the base model's scores on each task.
        tuned: the tuned model's scores, in the same order.
        flagged: for each task, which of its items the training rows contain.
    """
    comparisons = [_compare(before, after) for before, after in zip(base, tuned, strict=True)]
    adjusted = holm([comparison.p for comparison in comparisons])
    return [
        TaskEntry(
            name=before.task,
            metric=before.metric,
            higher_is_better=before.higher_is_better,
            version=before.version,
            fewshot=before.fewshot,
            rows=len(before.values),
            of=before.of,
            data=before.data,
            template=False,
            base=_score(comparison.base),
            tuned=_score(comparison.tuned),
            **_tested(comparison, p, before.higher_is_better),
            over_subjects=_over_subjects(before, after),
            contamination=_contamination(flagged.get(before.task, ()), before, after),
        )
        for before, after, comparison, p in zip(base, tuned, comparisons, adjusted, strict=True)
    ]


def held_out_entry(base: Losses, tuned: Losses) -> HeldOutEntry:
    """Loss per token. The bootstrap draws whole rows, since the tokens of a row are not independent."""
    rows = numpy.repeat(numpy.arange(len(base.sums)), base.tokens.astype(int))
    comparison = compare(
        *(numpy.repeat(losses.sums / losses.tokens, losses.tokens.astype(int)) for losses in (base, tuned)),
        clusters=rows,
    )
    return HeldOutEntry(
        what="validation rows of the run",
        rows=len(base.sums),
        tokens=int(base.tokens.sum()),
        base=loss_entry(base),
        tuned=loss_entry(tuned),
        **_tested(comparison, comparison.p, higher_is_better=False),
    )


def loss_entry(losses: Losses) -> LossEntry:
    """Loss and perplexity."""
    return LossEntry(loss=losses.mean, perplexity=losses.perplexity)


def metric_entry(name: str, base: Sequence[float] | float, tuned: Sequence[float] | float) -> MetricEntry:
    """A metric of answers: one score per answer, or one number for all answers, which has no interval."""
    if isinstance(base, float) or isinstance(tuned, float):
        assert isinstance(base, float), "both models have one number"
        assert isinstance(tuned, float), "both models have one number"
        single = (ScoreEntry(mean=mean, stderr=None, interval=None) for mean in (base, tuned))
        return MetricEntry(
            name=name, base=next(single), tuned=next(single), difference=None, p=None, verdict=None, detectable=None
        )
    comparison = compare(numpy.asarray(base), numpy.asarray(tuned))
    base_score, tuned_score = _score(comparison.base), _score(comparison.tuned)
    tested = _tested(comparison, comparison.p, higher_is_better=True)
    return MetricEntry(name=name, base=base_score, tuned=tuned_score, **tested)


def score_entry(values: numpy.ndarray) -> ScoreEntry:
    """The mean of one model's scores, with its interval; none if there are no scores."""
    return _score(compare(values, values).base) if len(values) else ScoreEntry(mean=None)


def _compare(base: Scored, tuned: Scored) -> PairedComparison:
    """Compare over items; if a benchmark has subjects, the bootstrap draws whole subjects."""
    clusters = base.subjects if len(set(base.subjects)) > 1 else None
    return compare(numpy.asarray(base.values), numpy.asarray(tuned.values), clusters=clusters)


def _over_subjects(base: Scored, tuned: Scored) -> SubjectsEntry | None:
    subjects = len(set(base.subjects))
    if subjects < 2:
        return None
    values = (numpy.asarray(scored.values) for scored in (base, tuned))
    comparison = compare(*values, clusters=base.subjects, over="clusters")
    scores = _score(comparison.base), _score(comparison.tuned)
    tested = _tested(comparison, comparison.p, base.higher_is_better)
    return SubjectsEntry(subjects=subjects, base=scores[0], tuned=scores[1], **tested)


def _contamination(flagged: Sequence[bool], base: Scored, tuned: Scored) -> ContaminationEntry | None:
    """Mean scores without the flagged items."""
    if not flagged:
        return None
    means: list[float | None] = []
    for scored in (base, tuned):
        clean = [value for value, is_flagged in zip(scored.values, flagged, strict=True) if not is_flagged]
        means.append(sum(clean) / len(clean) if clean else None)
    return ContaminationEntry(flagged=sum(flagged), base=means[0], tuned=means[1])


def _tested(comparison: PairedComparison, p_adjusted: float, higher_is_better: bool) -> Tested:
    return {
        "difference": _score(comparison.difference),
        "p": comparison.p,
        "p_adjusted": p_adjusted,
        "verdict": verdict(comparison.difference.mean, p_adjusted, higher_is_better),
        "detectable": _finite(comparison.detectable),
    }


def _score(estimate: Estimate) -> ScoreEntry:
    low, high = estimate.interval
    is_finite = math.isfinite(low) and math.isfinite(high)
    return ScoreEntry(mean=estimate.mean, stderr=_finite(estimate.stderr), interval=[low, high] if is_finite else None)


def _finite(value: float) -> float | None:
    """The value, or None if it is not finite because there are too few items: JSON has no infinity."""
    return value if math.isfinite(value) else None
