"""Conversations, which rows of every form become, and the errors of reading them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

from nybble.errors import DataError

Role = Literal["system", "user", "assistant", "text"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; a document is a single message with the role text."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's second field: its template separates it from the instruction, and other templates append it."""


Conversation = tuple[Message, ...]


class Rules(enum.IntEnum):
    """The version whose rules rows are read by: a run's rows stay as they were when it began."""

    V0_5 = 5
    """Version 0.5.1 refused what is now read with a notice, and accepted images and audio."""
    V0_6 = 6
    """Version 0.6.0: as in 0.5.1, the last of two equal keys counted, any character was an answer, and rows had no size limit."""
    NOW = 7


class EmptyAnswerError(DataError):
    """A row without an answer: the model would learn to say nothing."""


class BadValueError(DataError):
    """A fault that shows the row's value; faults of several rows that differ only in the value are reported as one.

    Args:
        message: what is wrong, without the value.
        value: the row's value.
    """

    def __init__(self, message: str, value: Any, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(f"{message}: {_shown(value)}", where=where, fix=fix)
        self.message = message


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "lists or objects nested too deeply to show"
