"""Benchmarks and their scores, item by item, and the cache that keeps scores between evaluations."""

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
    """The folder has no rows of a benchmark: the evaluation leaves it out, and says so."""


@dataclass(frozen=True)
class Scored:
    """One model's scores on one benchmark."""

    task: str
    metric: str
    higher_is_better: bool
    version: str
    fewshot: int
    of: int
    """Items that the benchmark has."""
    data: str
    """Where its rows came from: a file's name, or the Hub."""
    values: list[float]
    """Of each item."""
    subjects: list[str]
    """Which part of the benchmark each item belongs to; all the same where it has no parts."""
    texts: list[str]
    """What each item says, for the search of the training rows."""


@dataclass(frozen=True)
class Benchmark:
    """A task or a group of tasks, ready to be run."""

    name: str
    tasks: dict[str, Any]
    """lm-eval's tasks by name."""
    rows: dict[str, list[int]]
    """Which items of each."""
    of: int
    """How many items there are in all."""
    data: str
    """Where they came from."""
    digest: str
    """Of the items that are asked: equal means equal items."""


class Benchmarks(Protocol):
    """What runs benchmarks: `nybble.evaluate.harness.Harness`. lm-eval is optional, so only the harness imports it."""

    version: str
    limit: int | None

    def benchmark(self, name: str) -> AbstractContextManager[Benchmark]:
        """A benchmark with its rows read."""
        ...

    def score(self, benchmark: Benchmark, model: Any, tokenizer: Any, show: Callable[[float], None]) -> Scored:
        """A model's score on every item."""
        ...


@dataclass(frozen=True)
class Store:
    """Scores on disk, by everything that they depend on."""

    folder: pathlib.Path

    def scored(self, facts: dict[str, Any], compute: Callable[[], Scored]) -> tuple[Scored, bool]:
        """Scores from the cache, or else new ones, which are cached; and whether they were there. Damaged ones are replaced."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{key}.json"
        try:
            return Scored(**entries.read_note(file)["scored"]), True
        except FileNotFoundError:
            pass
        except entries.DamagedError as fault:
            logger.warning("the kept scores were damaged (%s) and are computed again", fault)
        scored = compute()
        entries.write_note(file, {"facts": facts, "scored": dataclasses.asdict(scored)})
        return scored, False
