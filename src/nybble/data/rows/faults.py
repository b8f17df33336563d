"""Faults of rows; equal ones are reported together: "rows.jsonl, lines 2 to 61: ..."."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.data.rows.formats.conversation import BadValueError
from nybble.errors import DataError

MAX_FAULTS = 20  # distinct ones
SHOWN_RANGES = 3  # of lines, per fault
MAX_RANGES = 1000  # of lines that are remembered, per fault; there may be millions
WHERE = re.compile(r"(.*):(row )?(\d+)", re.DOTALL)


class RowsError(DataError):
    """The same fault in one or more rows."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, rows: int = 1) -> None:
        super().__init__(what, where=where, fix=fix)
        self.rows = rows


@dataclass
class _FaultGroup:
    what: str
    """The message of the first of them."""
    fix: str | None
    ranges: list[list[int]] = field(default_factory=list)
    """First and last line of the first runs of consecutive rows."""
    more_ranges: int = 0
    """How many such runs there are besides these."""
    highest: int = 0
    """The highest line in any of them."""
    rows: int = 0
    last: int = -1
    """The newest row's number among all rows: there may be blank lines between consecutive rows."""

    def add_line(self, line: int, *, follows: bool) -> None:
        """Count a row's line; `follows` says whether the row before it has the same fault."""
        if follows and self.ranges:
            if not self.more_ranges:
                self.ranges[-1][1] = line
        elif line > self.highest or not any(first <= line <= last for first, last in self.ranges):
            if len(self.ranges) < MAX_RANGES:
                self.ranges.append([line, line])
            else:
                self.more_ranges += 1
        self.highest = max(self.highest, line)


@dataclass
class Faults:
    """The faults of rows, in the order in which they were first found."""

    groups: dict[tuple[str, str, str], _FaultGroup] = field(default_factory=dict)
    """By file, unit (line or row) and message."""

    def add(self, fault: DataError, row: int) -> None:
        """Add a fault.

        Args:
            fault: with the row's `file:line`.
            row: the row's number among all rows read.
        """
        where = WHERE.fullmatch(fault.where or "")
        file, line = (where[1], int(where[3])) if where else (fault.where or "", None)
        unit = "row" if where and where[2] else "line"
        message = fault.message if isinstance(fault, BadValueError) else fault.what
        group = self.groups.get((file, unit, message))
        if group is None:
            if len(self.groups) == MAX_FAULTS:
                return
            group = self.groups[file, unit, message] = _FaultGroup(fault.what, fault.fix)
        if line is not None:
            group.add_line(line, follows=group.last == row - 1)
        group.rows, group.last = group.rows + 1, row

    def listed(self) -> list[DataError]:
        """The distinct faults, each with all its lines."""
        return [
            RowsError(group.what, where=_where(file, unit, group), fix=group.fix, rows=group.rows)
            for (file, unit, _), group in self.groups.items()
        ]


def fault_lines(faults: Sequence[DataError], count: int) -> Iterator[str]:
    """One line per fault, and one with the number of faulty rows that are not among them."""
    yield from (f"  {fault.where}: {fault.what}" for fault in faults)
    more = count - sum(row_count(fault) for fault in faults)
    if more > 0:
        yield f"  and {more:,} more"


def row_count(fault: DataError) -> int:
    """The number of rows that have a fault."""
    return fault.rows if isinstance(fault, RowsError) else 1


def as_json(faults: Iterable[DataError]) -> list[list[Any]]:
    """The faults as values that JSON can represent, for the cache."""
    return [[fault.what, fault.where, fault.fix, row_count(fault)] for fault in faults]


def from_json(facts: Iterable[Sequence[Any]]) -> list[DataError]:
    """The faults from the values that `as_json` returned."""
    return [RowsError(what, where=where, fix=fix, rows=rows) for what, where, fix, rows in facts]


def _where(file: str, unit: str, group: _FaultGroup) -> str:
    ranges = [f"{first} to {last}" if last > first else f"{first}" for first, last in group.ranges]
    if not ranges:
        return file
    if len(ranges) == 1 and ranges[0].isdigit():  # a single row, perhaps read more than once
        return f"{file}:{'row ' if unit == 'row' else ''}{ranges[0]}"
    more = len(ranges) + group.more_ranges - SHOWN_RANGES
    shown = ranges if more <= 1 else [*ranges[:SHOWN_RANGES], f"{more:,} more"]
    return f"{file}, {unit}s {', '.join(shown[:-1])}{' and ' if shown[:-1] else ''}{shown[-1]}"
