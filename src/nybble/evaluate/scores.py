"""Benchmarks, their scores for each item, and the cache of scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from nybble.errors import EvaluationError
from nybble.files import cache as entries

logger = logging.getLogger(__name__)


class MissingRowsError(EvaluationError):
    """The folder has no rows of a benchmark: the evaluation leaves it out and reports it."""


@dataclass(frozen=True)
class Scored:
    """One model's scores on one benchmark."""

    task: str
    metric: str
    higher_is_better: bool
    version: str
    fewshot: int
    of: int
    """Number of items of the benchmark."""
    data: str
    """The source of its rows: a file's name, or the Hub."""
    values: list[float]
    """The score of each item."""
    subjects: list[str]
    """The part of the benchmark that each item belongs to; all the same if it has no parts."""
    texts: list[str]
    """The text of each item, to search for in the training rows."""


@dataclass(frozen=True)
class Benchmark:
    """A task or a group of tasks, ready to be run."""

    name: str
    tasks: dict[str, Any]
    """lm-eval's tasks by name."""
    rows: dict[str, list[int]]
    """The indices of the items used of each task."""
    of: int
    """Number of items of all tasks."""
    data: str
    """The source of the items."""
    digest: str
    """Digest of the items used: equal digests mean equal items."""


class Benchmarks(Protocol):
    """Runs benchmarks: `nybble.evaluate.harness.Harness`. lm-eval is optional, so only the harness imports it."""

    version: str
    limit: int | None
    batch: int | None
    """Requests in a batch; None for as many as fit."""

    def benchmark(self, name: str) -> AbstractContextManager[Benchmark]:
        """A benchmark with its rows read."""
        ...

    def score(self, benchmark: Benchmark, model: Any, tokenizer: Any, show: Callable[[float], None]) -> Scored:
        """A model's score on every item."""
        ...


@dataclass(frozen=True)
class Store:
    """The cache of scores, keyed by everything that they depend on."""

    folder: pathlib.Path

    def scored(self, facts: dict[str, Any], compute: Callable[[], Scored]) -> tuple[Scored, bool]:
        """Scores, and whether they came from the cache; new ones are cached, damaged ones replaced."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{key}.json"
        try:
            return Scored(**entries.read_note(file)["scored"]), True
        except FileNotFoundError:
            pass
        except entries.DamagedError as fault:
            logger.warning("the cached scores were damaged (%s) and are computed again", fault)
        scored = compute()
        entries.write_note(file, {"facts": facts, "scored": dataclasses.asdict(scored)})
        return scored, False
