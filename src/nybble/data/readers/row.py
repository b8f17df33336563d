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
    """`file:line` (for parquet and the Hub, the number of the row)."""
    source: int = 0
    """Which of the recipe's sources it comes from."""


Item = Row | DataError
