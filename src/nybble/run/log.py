"""The lines of metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from nybble.errors import NybbleError, RunError
from nybble.files.reading import read_lines
from nybble.run.folder import Run
from nybble.run.records import Line


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, but the last one where a crash cut it off.

    Raises:
        RunError: naming the first line that is damaged.
    """
    found = list(read_lines(run.metrics, RunError, Line))
    if found and isinstance(found[-1], NybbleError):
        found.pop()
    return _whole(found)


def lines_until(file: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or samples.jsonl up to a step, as a resumed run goes on from it; -1 for none.

    Raises:
        RunError: naming the first line among them that is damaged; later ones do not matter.
    """
    found = list(read_lines(file, RunError, Line))
    early = [place for place, line in enumerate(found) if isinstance(line, dict) and line["step"] <= step]
    return [line for line in _whole(found[: max(early, default=-1) + 1]) if line["step"] <= step]


def _whole(lines: Sequence[dict[str, Any] | NybbleError]) -> list[dict[str, Any]]:
    for line in lines:
        if isinstance(line, NybbleError):
            raise line
    return [line for line in lines if isinstance(line, dict)]
