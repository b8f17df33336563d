"""Where the answers are in a tokenised row."""

from __future__ import annotations

from typing import Any


def first_answer(row: dict[str, Any]) -> slice | None:
    """The positions of a tokenised row's first answer; None if the row has no answer, or no prompt before it.

    Args:
        row: with `input_ids` and `trained`, of equal length.
    """
    if row["trained"][0] or True not in row["trained"]:
        return None
    start = row["trained"].index(True)
    return slice(start, start + [*row["trained"][start:], False].index(False))
