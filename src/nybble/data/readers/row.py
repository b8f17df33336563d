"""What a reader yields: rows, each with its place, and in place of a row that cannot be read the fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nybble.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    origin: str
    """`file:line`, of rows that share a line with the number of the row (for parquet and the Hub, that number alone)."""
    source: int = 0
    """Which of the recipe's sources it comes from."""


@dataclass(frozen=True)
class Notice:
    """What the user should know of how a file was read, though nothing is wrong with it."""

    what: str


Item = Row | Notice | DataError


def row_of(value: Any, origin: str) -> Row:
    """A decoded value as a row.

    Raises:
        DataError: it has no named fields.
    """
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object with named fields, not {type(value).__name__}", where=origin)
    return Row(value, origin)
