"""What a reader yields: rows with their `file:line`, notices, and a fault in place of each row that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nybble.errors import DataError

MB = 1_000_000
MAX_ROW = 16 * MB
"""The default of data.max_row_mb as a number: characters of text, bytes of a parquet file."""
ADVICE = "split it; if it is meant to be this large, allow it with {}"
NAMES_SHOWN = 12
LONGEST_NAME = 60


@dataclass(frozen=True)
class Row:
    """One row as it is in its file."""

    values: dict[str, Any]
    origin: str
    """`file:line`, with the row's number if rows share a line; for parquet and the Hub, `file:row number`."""
    source: int = 0
    """The number of the recipe's source that it comes from."""
    repeated: str | None = None
    """A key that one of its objects has twice; `values` has the last of the two values."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a cell that exists but cannot be read, which matters only if its column is used."""

    why: str


@dataclass(frozen=True)
class Notice:
    """What the user should know about how a file was read, although nothing is wrong with it."""

    what: str


Item = Row | Notice | DataError


def row_of(value: Any, origin: str, repeated: str | None = None) -> Row:
    """A decoded value as a row.

    Raises:
        DataError: it is not an object with named fields.
    """
    if not isinstance(value, dict):
        name = "null" if value is None else type(value).__name__
        raise DataError(f"a row must be an object with named fields, not {name}", where=origin)
    return Row(value, origin, repeated=repeated)


class TooLargeError(DataError):
    """A row or a file over the limit.

    Args:
        what: what is wrong.
        where: its `file:line`.
        option: the option that allows it, with its value.
        advice: what to do, with {} in place of the option.
    """

    def __init__(self, what: str, where: str | None, option: str, advice: str = ADVICE) -> None:
        super().__init__(what, where=where, fix=advice.replace("{}", option))
        self.option = option


def too_large(what: str, limit: int, where: str, size: int | None = None) -> TooLargeError:
    """The fault of a row, or a part of one, over the limit.

    Args:
        what: the part, such as "a row".
        limit: its maximum size.
        where: its `file:line`.
        size: its size; None if that is unknown without reading all of it.
    """
    shown = f"of {size / MB:,.1f} MB" if size is not None else f"of more than {limit / MB:,.0f} MB"
    over = f", over the limit of {limit / MB:,.0f} MB" if size is not None else ""
    enough = 2 * limit if size is None else size
    return TooLargeError(f"{what} {shown}{over}", where, f"data.max_row_mb={-(-enough // MB)}")


def listing(names: Iterable[object]) -> str:
    """Names for a message: the first ones, shortened if they are long."""
    shown = [(name if isinstance(name, str) and name.isprintable() else repr(name))[:LONGEST_NAME] for name in names]
    more = len(shown) - NAMES_SHOWN
    return ", ".join(shown[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
