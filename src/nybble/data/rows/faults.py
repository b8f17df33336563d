"""Faults of rows, equal ones reported together: "rows.jsonl, lines 2 to 61: ..."."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.data.rows.formats.conversation import ShownError
from nybble.errors import DataError

MOST_FAULTS = 20  # different ones
SHOWN_RANGES = 3  # of lines, for each fault
MOST_RANGES = 1000  # of lines that are remembered; there may be millions
WHERE = re.compile(r"(.*):(row )?(\d+)", re.DOTALL)


class RowsError(DataError):
    """The same fault in one or several rows."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, rows: int = 1) -> None:
        super().__init__(what, where=where, fix=fix)
        self.rows = rows


@dataclass
class _EqualFaults:
    what: str
    """Of the first of them."""
    fix: str | None
    ranges: list[list[int]] = field(default_factory=list)
    """First and last line of each run of neighbouring rows, of the first runs."""
    more: int = 0
    """How many there are beyond these."""
    highest: int = 0
    """The highest line that is counted in any."""
    rows: int = 0
    last: int = -1
    """The newest row's number among all rows: between neighbours there may be blank lines."""

    def add_line(self, line: int, *, follows: bool) -> None:
        """Count a row's line; `follows` where the row before it has the same fault."""
        if follows and self.ranges:
            if not self.more:
                self.ranges[-1][1] = line
        elif line > self.highest or not any(first <= line <= last for first, last in self.ranges):
            if len(self.ranges) < MOST_RANGES:
                self.ranges.append([line, line])
            else:
                self.more += 1
        self.highest = max(self.highest, line)


@dataclass
class Faults:
    """What is wrong with rows, in the order in which it was first found."""

    found: dict[tuple[str, str, str], _EqualFaults] = field(default_factory=dict)

    def add(self, fault: DataError, row: int) -> None:
        """Note a fault.

        Args:
            fault: with the row's `file:line`.
            row: the row's number among all rows that are read.
        """
        where = WHERE.fullmatch(fault.where or "")
        file, line = (where[1], int(where[3])) if where else (fault.where or "", None)
        unit = "row" if where and where[2] else "line"
        alike = fault.alike if isinstance(fault, ShownError) else fault.what
        same = self.found.get((file, unit, alike))
        if same is None:
            if len(self.found) == MOST_FAULTS:
                return
            same = self.found[file, unit, alike] = _EqualFaults(fault.what, fault.fix)
        if line is not None:
            same.add_line(line, follows=same.last == row - 1)
        same.rows, same.last = same.rows + 1, row

    def listed(self) -> list[DataError]:
        """The different faults, each with all its lines."""
        return [
            RowsError(same.what, where=_where(file, unit, same), fix=same.fix, rows=same.rows)
            for (file, unit, _), same in self.found.items()
        ]


def fault_lines(faults: Sequence[DataError], count: int) -> Iterator[str]:
    """A line per fault, and how many of the faulty rows have other ones."""
    yield from (f"  {fault.where}: {fault.what}" for fault in faults)
    more = count - sum(rows_with(fault) for fault in faults)
    if more > 0:
        yield f"  and {more:,} more"


def rows_with(fault: DataError) -> int:
    """How many rows have it."""
    return fault.rows if isinstance(fault, RowsError) else 1


def as_json(faults: Iterable[DataError]) -> list[list[Any]]:
    """For the cache."""
    return [[fault.what, fault.where, fault.fix, rows_with(fault)] for fault in faults]


def from_json(facts: Iterable[Sequence[Any]]) -> list[DataError]:
    """What `as_json` made."""
    return [RowsError(what, where=where, fix=fix, rows=rows) for what, where, fix, rows in facts]


def _where(file: str, unit: str, same: _EqualFaults) -> str:
    named = [f"{first} to {last}" if last > first else f"{first}" for first, last in same.ranges]
    if not named:
        return file
    if len(named) == 1 and named[0].isdigit():  # a row that was read more than once
        return f"{file}:{'row ' if unit == 'row' else ''}{named[0]}"
    more = len(named) + same.more - SHOWN_RANGES
    shown = named if more <= 1 else [*named[:SHOWN_RANGES], f"{more:,} more"]
    return f"{file}, {unit}s {', '.join(shown[:-1])}{' and ' if shown[:-1] else ''}{shown[-1]}"
