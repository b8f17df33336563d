"""parity.json: how an exported model was compared with the run; beside it, or as NAME.failed.json where it was not kept."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from nybble.export.parity.compare import Comparison
from nybble.export.parity.verdict import Verdict
from nybble.run.records import AnyText, FrozenShape, RunRecord, write_record
from nybble.run.versions import versions


class DivergenceEntry(FrozenShape):
    """A base with the adapter merged into it, against the run."""

    kl: float
    """Mean of KL(run || merged), in nats per token."""
    error: float
    """Standard error of that mean."""
    perplexity: float
    agreement: float
    """Share of the tokens whose likeliest successor is the same."""


class ComparisonEntry(FrozenShape):
    """The bases that the adapter may be merged into, against the run."""

    rows: int
    tokens: int
    what: AnyText
    """Which rows."""
    perplexity: float
    """Of the run."""
    bases: dict[AnyText, DivergenceEntry]


class Distances(FrozenShape):
    """How far the exported model is from the run, over the tokens of the run's answers."""

    tokens: int
    kl: float
    """Mean, in nats per token."""
    kl_worst: float
    difference_mean: float
    """Of the log-probabilities of the run's 10 likeliest tokens."""
    difference_worst: float
    equal_likeliest: float
    """Share of the tokens whose likeliest successor is the same."""
    expected_kl: float
    """Of the merged weights, computed as the run computes."""
    kl_limit: float
    questions: int
    equal_answers: int
    """Equal token by token."""
    run_ended: int
    """Answers of the run that end by themselves."""
    artefact_ended: int


class ComparedAnswer(FrozenShape):
    """What run and exported model answered to one prompt."""

    prompt: AnyText
    run: AnyText
    artefact: AnyText
    first_difference: int | None
    """The first token that differs; None where the answers are equal."""
    run_ended: bool
    artefact_ended: bool


class Check(FrozenShape):
    """One file or type of an export, through the program of its user."""

    passed: bool
    kind: AnyText
    """adapter, a dtype, or a GGUF type."""
    by: AnyText
    """The program and its version."""
    failures: list[AnyText]
    numbers: Distances
    answers: list[ComparedAnswer]


class Parity(RunRecord):
    """All that was measured of an export."""

    date: AnyText
    versions: dict[AnyText, AnyText]
    merge_base: AnyText | None
    """None for an adapter."""
    comparison: ComparisonEntry | None
    checks: list[Check | AnyText]
    """Text says what could not be checked, and why."""

    @property
    def failed(self) -> list[Check]:
        """The checks that were not passed."""
        return [check for check in self.checks if isinstance(check, Check) and not check.passed]


def parity_record(base: str | None, comparison: Comparison | None, verdicts: Sequence[Verdict | str]) -> Parity:
    """What was measured, as its record.

    Args:
        base: which base was merged; None for an adapter.
        comparison: of the bases, where there were any.
        verdicts: of the gate, or what was not checked.
    """
    return Parity(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        merge_base=base,
        comparison=None if comparison is None else ComparisonEntry.model_validate(asdict(comparison)),
        checks=[
            verdict if isinstance(verdict, str) else Check.model_validate(verdict.as_dict()) for verdict in verdicts
        ],
    )


def write_parity(file: pathlib.Path, parity: Parity) -> None:
    """Write the record."""
    write_record(file, parity)
