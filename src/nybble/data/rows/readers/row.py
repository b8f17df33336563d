"""What a reader yields: rows, each with its `file:line`, and in place of a row that cannot be read the fault."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nybble.errors import DataError

MB = 1_000_000
MAX_ROW = 16 * MB
"""The largest row that is read unless data.max_row_mb says otherwise: characters of text, bytes of a parquet file."""
ADVICE = "split it; if it is meant to be this large, allow it with {}"
NAMES_SHOWN = 12
LONGEST_NAME = 60


@dataclass(frozen=True)
class Row:
    """One row as it is in its file."""

    values: dict[str, Any]
    origin: str
    """`file:line`, of rows that share a line with the number of the row (for parquet and the Hub, that number alone)."""
    source: int = 0
    """Which of the recipe's sources it comes from."""
    repeated: str | None = None
    """A key that one of its objects has twice; `values` holds what the last one says."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a cell that is there but cannot be read: whether that matters depends on whether the column is used."""

    why: str


@dataclass(frozen=True)
class Notice:
    """What the user should know of how a file was read, though nothing is wrong with it."""

    what: str


Item = Row | Notice | DataError


def row_of(value: Any, origin: str, repeated: str | None = None) -> Row:
    """A decoded value as a row.

    Raises:
        DataError: it has no named fields.
    """
    if not isinstance(value, dict):
        name = "null" if value is None else type(value).__name__
        raise DataError(f"a row must be an object with named fields, not {name}", where=origin)
    return Row(value, origin, repeated=repeated)


class TooLargeError(DataError):
    """A row or a file over the limit.

    Args:
        option: what allows it.
        advice: what to do, with {} for the option.
    """

    def __init__(self, what: str, where: str | None, option: str, advice: str = ADVICE) -> None:
        super().__init__(what, where=where, fix=advice.replace("{}", option))
        self.option = option


def too_large(what: str, limit: int, where: str, size: int | None = None) -> TooLargeError:
    """The fault of a row, or a part of one, over the limit.

    Args:
        what: which part.
        limit: how large it may be.
        where: its `file:line`.
        size: how large it is; None where that is not known without reading all of it.
    """
    shown = f"of {size / MB:,.1f} MB" if size is not None else f"of more than {limit / MB:,.0f} MB"
    over = f", over the limit of {limit / MB:,.0f} MB" if size is not None else ""
    enough = 2 * limit if size is None else size
    return TooLargeError(f"{what} {shown}{over}", where, f"data.max_row_mb={-(-enough // MB)}")


def listing(names: Iterable[object]) -> str:
    """Names as a message shows them: the first ones, none of them at length."""
    shown = [(name if isinstance(name, str) and name.isprintable() else repr(name))[:LONGEST_NAME] for name in names]
    more = len(shown) - NAMES_SHOWN
    return ", ".join(shown[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
