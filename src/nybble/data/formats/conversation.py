"""What every form of row becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
