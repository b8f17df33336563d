"""What every form of row becomes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

from nybble.errors import DataError

Role = Literal["system", "user", "assistant", "text"]


@dataclass(frozen=True)
class Message:
    """One turn; a document stands alone, with the role text."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's second field, which its template sets apart from the instruction; other templates append it."""


Conversation = tuple[Message, ...]


class Rules(enum.IntEnum):
    """By which version's rules rows are read: a run's rows stay what they were when it began."""

    V0_5 = 5
    """Of 0.5.1, which refused what is now read with a note, and took pictures and sound."""
    V0_6 = 6
    """Of 0.6.0, for which, as for 0.5.1, the last of two keys counted, any character was an answer, and rows had no limit."""
    NOW = 7


class EmptyAnswerError(DataError):
    """A row that would teach to say nothing."""


class ShownError(DataError):
    """A fault that shows what stands in the row; it is the same as another row's where all but that is.

    Args:
        alike: what is wrong.
        value: what stands in the row.
    """

    def __init__(self, alike: str, value: Any, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(f"{alike}: {_shown(value)}", where=where, fix=fix)
        self.alike = alike


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "lists or objects within each other, too many to show"
