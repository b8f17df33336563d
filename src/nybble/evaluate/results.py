"""Measured scores as the entries of evaluation.json: means with intervals, differences, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from nybble.evaluate.perplexity import Losses
from nybble.evaluate.scores import Scored
from nybble.evaluate.statistics import Comparison, Estimate, compare, holm, verdict


def compared_tasks(
    base: Sequence[Scored], tuned: Sequence[Scored], flagged: Mapping[str, Sequence[bool]]
) -> list[dict[str, Any]]:
    """An entry a benchmark; p-values are adjusted over all of them (Holm 1979).

    Args:
        base: the base model's scores by task.
        tuned: the tuned model's, in the same order.
        flagged: of each task's items, whether the training rows hold it.
    """
    compared = [_compared(before, after) for before, after in zip(base, tuned, strict=True)]
    adjusted = holm([found.p for found in compared])
    entries = []
    for before, after, found, p in zip(base, tuned, compared, adjusted, strict=True):
        entries.append({
            "name": before.task, "metric": before.metric, "higher_is_better": before.higher_is_better,
            "version": before.version, "fewshot": before.fewshot, "rows": len(before.values), "of": before.of,
            "data": before.data, "template": False,
            **_numbers(found, p, before.higher_is_better),
            "over_subjects": _over_subjects(before, after),
            "contamination": _without(flagged.get(before.task, ()), before, after),
        })  # fmt: skip
    return entries


def held_out_entry(base: Losses, tuned: Losses) -> dict[str, Any]:
    """Loss a token with whole rows drawn: the tokens of a row go together."""
    rows = numpy.repeat(numpy.arange(len(base.sums)), base.tokens.astype(int))
    found = compare(
        *(numpy.repeat(own.sums / own.tokens, own.tokens.astype(int)) for own in (base, tuned)), clusters=rows
    )
    numbers = _numbers(found, found.p, higher_is_better=False)
    return {
        "what": "validation rows of the run", "rows": len(base.sums), "tokens": int(base.tokens.sum()),
        **numbers, "base": entry_of(base), "tuned": entry_of(tuned),
    }  # fmt: skip


def entry_of(losses: Losses) -> dict[str, float]:
    """Loss and perplexity."""
    return {"loss": losses.mean, "perplexity": losses.perplexity}


def metric_entry(name: str, base: Sequence[float] | float, tuned: Sequence[float] | float) -> dict[str, Any]:
    """A metric of answers: of each answer, or one number of all of them, which has no interval."""
    if isinstance(base, float) or isinstance(tuned, float):
        single = {
            who: {"mean": own, "stderr": None, "interval": None} for who, own in (("base", base), ("tuned", tuned))
        }
        return {"name": name, **single, "difference": None, "p": None, "verdict": None, "detectable": None}
    found = compare(numpy.asarray(base), numpy.asarray(tuned))
    return {"name": name, **_numbers(found, found.p, higher_is_better=True)}


def _compared(base: Scored, tuned: Scored) -> Comparison:
    """Over items; where a benchmark has subjects, whole subjects are drawn."""
    clusters = base.subjects if len(set(base.subjects)) > 1 else None
    return compare(numpy.asarray(base.values), numpy.asarray(tuned.values), clusters=clusters)


def _over_subjects(base: Scored, tuned: Scored) -> dict[str, Any] | None:
    subjects = len(set(base.subjects))
    if subjects < 2:
        return None
    values = (numpy.asarray(own.values) for own in (base, tuned))
    found = compare(*values, clusters=base.subjects, over="clusters")
    return {"subjects": subjects, **_numbers(found, found.p, base.higher_is_better)}


def _without(flagged: Sequence[bool], base: Scored, tuned: Scored) -> dict[str, Any] | None:
    """Scores without the flagged items."""
    if not flagged:
        return None
    means = {}
    for who, scored in (("base", base), ("tuned", tuned)):
        kept = [value for value, own in zip(scored.values, flagged, strict=True) if not own]
        means[who] = sum(kept) / len(kept) if kept else None
    return {"flagged": sum(flagged), **means}


def _numbers(found: Comparison, p_adjusted: float, higher_is_better: bool) -> dict[str, Any]:
    return {
        "base": _estimate(found.base),
        "tuned": _estimate(found.tuned),
        "difference": _estimate(found.difference),
        "p": found.p,
        "p_adjusted": p_adjusted,
        "verdict": verdict(found.difference.mean, p_adjusted, higher_is_better),
        "detectable": _finite(found.detectable),
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    low, high = found.interval
    known = math.isfinite(low) and math.isfinite(high)
    return {"mean": found.mean, "stderr": _finite(found.stderr), "interval": [low, high] if known else None}


def _finite(value: float) -> float | None:
    """None where too few items tell nothing: JSON has no infinity."""
    return value if math.isfinite(value) else None
