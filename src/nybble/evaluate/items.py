"""Scores of single items, from lm-eval's log of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.errors import EvaluationError
from nybble.evaluate.scores import Benchmark, Scored

METRICS = ("acc_norm", "exact_match", "acc")
"""The metric that counts is the first of these that a task has, or else the first that it lists."""


def scores_of(benchmark: Benchmark, results: Mapping[str, Any]) -> Scored:
    """The scores of a benchmark.

    Args:
        benchmark: the benchmark that was run.
        results: the result of lm-eval's simple_evaluate, with its log of every item.

    Raises:
        EvaluationError: the task's metric is not one of single items.
    """
    metric, values, subjects, texts = "", [], [], []
    for part in benchmark.rows:
        logged = results["samples"][part]
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
        benchmark.name, metric, results["higher_is_better"][first].get(metric, True), str(results["versions"].get(first)),
        results["n-shot"][first], benchmark.of, benchmark.data, values, subjects, texts,
    )  # fmt: skip


def _text_of(entry: Mapping[str, Any]) -> str:
    """All texts of an item, and its question followed by the right answer if that was one of lm-eval's requests."""
    target, requests = entry["target"], entry["arguments"]
    right = requests[target] if isinstance(target, int) and 0 <= target < len(requests) else ()
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
