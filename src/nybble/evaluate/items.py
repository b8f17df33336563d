"""Scores of single items, from what lm-eval logs of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.errors import EvaluationError
from nybble.evaluate.scores import Benchmark, Scored

METRICS = ("acc_norm", "exact_match", "acc")
"""Which metric of a task counts, the first it has; otherwise the first that it lists."""


def scores_of(benchmark: Benchmark, found: Mapping[str, Any]) -> Scored:
    """The scores of a benchmark.

    Args:
        benchmark: what was run.
        found: what lm-eval's simple_evaluate returned, with its log of every item.

    Raises:
        EvaluationError: the task's metric is not one of single items.
    """
    metric, values, subjects, texts = "", [], [], []
    for part in benchmark.rows:
        logged = found["samples"][part]
        one_filter = [entry for entry in logged if entry["filter"] == logged[0]["filter"]]
        metric = metric or next(
            (name for name in METRICS if name in one_filter[0]["metrics"]), one_filter[0]["metrics"][0]
        )
        for entry in sorted(one_filter, key=lambda entry: entry["doc_id"]):
            if not isinstance(entry[metric], int | float):
                raise EvaluationError(
                    f"{benchmark.name}: {metric} is not a score of single items, so it cannot be compared"
                )
            values.append(float(entry[metric]))
            subjects.append(part)
            texts.append(_text_of(entry))
    first = next(iter(benchmark.rows))
    return Scored(
        benchmark.name, metric, found["higher_is_better"][first].get(metric, True), str(found["versions"].get(first)),
        found["n-shot"][first], benchmark.of, benchmark.data, values, subjects, texts,
    )  # fmt: skip


def _text_of(entry: Mapping[str, Any]) -> str:
    """All that an item says, and its question followed by the right answer where lm-eval asked for just that."""
    target, asked = entry["target"], entry["arguments"]
    right = asked[target] if isinstance(target, int) and 0 <= target < len(asked) else ()
    return "\n".join([*_strings(entry["doc"]), "".join(part for part in right if isinstance(part, str))])


def _strings(value: Any) -> Iterator[str]:
    """Every text in an item."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
