"""Faults of rows, those that are equal told together: "rows.jsonl, lines 2 to 61: ..."."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.data.rows.formats.conversation import ShownError
from nybble.errors import DataError

KEPT = 20  # different ones
STRETCHES = 3  # of lines, named for each
REMEMBERED = 1000  # of them; there may be millions
PLACE = re.compile(r"(.*):(row )?(\d+)", re.DOTALL)


class RowsError(DataError):
    """The same fault in one or several rows."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, rows: int = 1) -> None:
        super().__init__(what, where=where, fix=fix)
        self.rows = rows


@dataclass
class _Same:
    what: str
    """Of the first of them."""
    fix: str | None
    stretches: list[list[int]] = field(default_factory=list)
    """First and last line of rows that follow each other, the first ones."""
    more: int = 0
    """How many there are beyond these."""
    highest: int = 0
    """The highest line that is counted in any."""
    rows: int = 0
    last: int = -1
    """The newest row's number among all rows: between neighbours there may be blank lines."""

    def place(self, line: int, *, follows: bool) -> None:
        """Count a row's line; `follows` where the row before it has the same fault."""
        if follows and self.stretches:
            if not self.more:
                self.stretches[-1][1] = line
        elif line > self.highest or not any(first <= line <= last for first, last in self.stretches):
            if len(self.stretches) < REMEMBERED:
                self.stretches.append([line, line])
            else:
                self.more += 1
        self.highest = max(self.highest, line)


@dataclass
class Faults:
    """What is wrong with rows, in the order in which it was first met."""

    found: dict[tuple[str, str, str], _Same] = field(default_factory=dict)

    def add(self, fault: DataError, row: int) -> None:
        """Note a fault.

        Args:
            fault: with the row's `file:line`.
            row: the row's number among all rows that are read.
        """
        place = PLACE.fullmatch(fault.where or "")
        file, line = (place[1], int(place[3])) if place else (fault.where or "", None)
        unit = "row" if place and place[2] else "line"
        alike = fault.alike if isinstance(fault, ShownError) else fault.what
        same = self.found.get((file, unit, alike))
        if same is None:
            if len(self.found) == KEPT:
                return
            same = self.found[file, unit, alike] = _Same(fault.what, fault.fix)
        if line is not None:
            same.place(line, follows=same.last == row - 1)
        same.rows, same.last = same.rows + 1, row

    def listed(self) -> list[DataError]:
        """The different faults, each with all its lines."""
        return [
            RowsError(same.what, where=_where(file, unit, same), fix=same.fix, rows=same.rows)
            for (file, unit, _), same in self.found.items()
        ]


def told(faults: Sequence[DataError], count: int) -> Iterator[str]:
    """A line a fault, and how many rows, of so many that are faulty, have others still."""
    yield from (f"  {fault.where}: {fault.what}" for fault in faults)
    more = count - sum(rows_of(fault) for fault in faults)
    if more > 0:
        yield f"  and {more:,} more"


def rows_of(fault: DataError) -> int:
    """How many rows it tells of."""
    return fault.rows if isinstance(fault, RowsError) else 1


def as_json(faults: Iterable[DataError]) -> list[list[Any]]:
    """To keep in a cache."""
    return [[fault.what, fault.where, fault.fix, rows_of(fault)] for fault in faults]


def from_json(kept: Iterable[Sequence[Any]]) -> list[DataError]:
    """What `as_json` made."""
    return [RowsError(what, where=where, fix=fix, rows=rows) for what, where, fix, rows in kept]


def _where(file: str, unit: str, same: _Same) -> str:
    named = [f"{first} to {last}" if last > first else f"{first}" for first, last in same.stretches]
    if not named:
        return file
    if len(named) == 1 and named[0].isdigit():  # a row that was read more than once
        return f"{file}:{'row ' if unit == 'row' else ''}{named[0]}"
    more = len(named) + same.more - STRETCHES
    shown = named if more <= 1 else [*named[:STRETCHES], f"{more:,} more places"]
    return f"{file}, {unit}s {', '.join(shown[:-1])}{' and ' if shown[:-1] else ''}{shown[-1]}"
