"""What a damaged input is, and how it is tried: by the command line, as a user would."""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest

from nybble import cli
from nybble.cli.defects import STATUS


@dataclass(frozen=True)
class Case:
    """One damaged input."""

    name: str
    """Unique among its kind; it becomes the test's id."""
    make: Callable[[pathlib.Path], object]
    """Writes the input into a folder, or damages what lies there; what it needs beyond that the kind's own test says."""
    status: int
    """The exit status."""
    names: tuple[str, ...] = ()
    """What the message must name: the file, the line, the tensor, the value."""


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    status: int
    text: str
    """Both streams."""


def nybble(*words: object, cache: pathlib.Path) -> Outcome:
    """Run the command line in this process; whatever happens, it must not reach the last line of defence."""
    stream = io.StringIO()
    argv = ["nybble", "--cache", str(cache), *map(str, words)]
    status: int | str | None = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
    text = stream.getvalue()
    assert "Traceback (most recent call last)" not in text, text
    assert status != STATUS, text
    return Outcome(status if isinstance(status, int) else int(status is not None), text)


def held(case: Case, outcome: Outcome) -> None:
    """Assert that an outcome is the case's."""
    plain = " ".join(outcome.text.split())  # a terminal breaks lines
    assert outcome.status == case.status, outcome.text
    for name in case.names:
        assert name in plain, f"{name!r} is not named:\n{outcome.text}"


def sampled(cases: Sequence[Case], every: int) -> list[object]:
    """The cases as parameters: the fast suite takes each `every`-th, the slow one all others."""
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"
    return [
        pytest.param(case, id=case.name, marks=() if place % every == 0 else pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
