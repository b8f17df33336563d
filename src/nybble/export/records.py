"""parity.json: the comparison of an exported model with the run. If the model was not kept, it is NAME.failed.json."""

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
    """What kind of rows."""
    perplexity: float
    """The perplexity of the run."""
    bases: dict[AnyText, DivergenceEntry]


class Distances(FrozenShape):
    """How far the exported model is from the run, over the tokens of the run's answers."""

    tokens: int
    kl: float
    """The mean, in nats per token."""
    kl_worst: float
    difference_mean: float
    """The mean difference of the log-probabilities of the run's 10 likeliest tokens."""
    difference_worst: float
    equal_likeliest: float
    """Share of the tokens whose likeliest successor is the same."""
    expected_kl: float
    """The divergence of the merged weights, computed in the same way as the run."""
    kl_limit: float
    questions: int
    equal_answers: int
    """Answers that are equal token by token."""
    run_ended: int
    """Answers of the run that end by themselves."""
    artefact_ended: int


class ComparedAnswer(FrozenShape):
    """The answers of run and exported model to one prompt."""

    prompt: AnyText
    run: AnyText
    artefact: AnyText
    first_difference: int | None
    """The index of the first token that differs; None if the answers are equal."""
    run_ended: bool
    artefact_ended: bool


class Check(FrozenShape):
    """The check of one file or type of an export, in the program that its users run."""

    passed: bool
    kind: AnyText
    """adapter, a dtype, or a GGUF type."""
    by: AnyText
    """The program and its version."""
    failures: list[AnyText]
    numbers: Distances
    answers: list[ComparedAnswer]


class Parity(RunRecord):
    """Everything that was measured on an export."""

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
    """The record of what was measured.

    Args:
        base: which base was merged; None for an adapter.
        comparison: the comparison of the bases, if there are any.
        verdicts: the verdicts of the gate; text says what was not checked.
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
