"""What a benchmark gives, item by item, and where it is kept between evaluations."""

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
from nybble.files import cache as kept

logger = logging.getLogger(__name__)


class MissingRowsError(EvaluationError):
    """A benchmark whose rows are not in the folder: the evaluation goes on without it, and says so."""


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


class Benchmarks(Protocol):
    """What runs benchmarks (`nybble.evaluate.harness.Harness`; lm-eval is optional, so nobody here imports it)."""

    version: str
    limit: int | None

    def benchmark(self, name: str) -> AbstractContextManager[Any]:
        """A benchmark with its rows read."""
        ...

    def score(self, benchmark: Any, model: Any, tokenizer: Any, show: Callable[[float], None]) -> Scored:
        """A model's score on every item."""
        ...


@dataclass(frozen=True)
class Store:
    """Scores on disk, by everything that they depend on."""

    folder: pathlib.Path

    def scored(self, facts: dict[str, Any], compute: Callable[[], Scored]) -> tuple[Scored, bool]:
        """Kept scores or new ones, which are then kept; and whether they were there. Damaged ones are computed again."""
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{key}.json"
        try:
            return Scored(**kept.read_note(file)["scored"]), True
        except FileNotFoundError:
            pass
        except kept.DamagedError as fault:
            logger.warning("the kept scores were damaged (%s) and are computed again", fault)
        scored = compute()
        kept.write_note(file, {"facts": facts, "scored": dataclasses.asdict(scored)})
        return scored, False
