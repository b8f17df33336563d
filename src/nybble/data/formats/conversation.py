"""What every form of row becomes."""

from __future__ import annotations

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
