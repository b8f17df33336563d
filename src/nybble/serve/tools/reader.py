"""Reads calls in an answer as it arrives: what is text, which function is called, and its arguments piece by piece."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from nybble.chat.text import suffix_that_begins
from nybble.serve.tools.calls import CallForm


@dataclass
class ReadCall:
    """A call in an answer."""

    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    arguments: str = ""
    """JSON text, of which the end may still be missing."""

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ObjectEnd:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """How many characters of the next piece belong to the object; None if all do and it goes on."""
        for n, character in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return n + 1
        return None


class CallReader:
    """Splits one answer.

    Args:
        form: how the model writes calls.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._pending = ""
        """What is not yet known to be text or part of a call."""
        self._end: ObjectEnd | None = None
        """While the arguments of the last call are read."""
        self._text_began = False
        self.calls: list[ReadCall] = []
        self.text = ""

    @property
    def is_complete(self) -> bool:
        """Whether there are calls, and the last one has all its arguments."""
        return bool(self.calls) and self._end is None

    def push(self, piece: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Take the next piece of the answer.

        Returns:
            The text that is now certain, and what is new of the calls, as OpenAI's API streams it.
        """
        self._pending += piece
        text, deltas = "", []
        while True:
            pending, calls = self._pending, len(self.calls)
            if self._end is not None:
                deltas += self._arguments(self._end)
            elif self.calls or self._at_call(last=last):
                deltas += self._opening()
            else:
                text += self._certain_text(last=last)
            if (self._pending, len(self.calls)) == (pending, calls):
                break
        self.text += text
        return text, deltas

    def _at_call(self, *, last: bool) -> bool:
        """Whether what is pending begins with a call; text before a call is first removed by `_certain_text`."""
        pending = self._pending.lstrip()
        marker = self._form.marker
        if marker:
            return pending.startswith(marker)
        return not self._text_began and pending.startswith(self._form.opening.lstrip())

    def _certain_text(self, *, last: bool) -> str:
        """Removes from what is pending, and returns, what is certainly text."""
        pending, marker = self._pending, self._form.marker
        if marker:
            found = pending.find(marker)
            certain = found if found >= 0 else len(pending) - (0 if last else suffix_that_begins(pending, [marker]))
            certain = certain if last and found < 0 else len(pending[:certain].rstrip())  # white space before a call
        else:
            opening = self._form.opening.lstrip()
            undecided = not self._text_began and opening.startswith(pending.lstrip()) and not last
            certain = 0 if undecided else len(pending)
        self._pending = pending[certain:]
        self._text_began = self._text_began or bool(pending[:certain].strip())
        return pending[:certain]

    def _opening(self) -> list[dict[str, Any]]:
        """Once the name is known, the beginning of a call."""
        form = self._form
        before = f"{form.closing}{form.separator}" if self.calls else ""  # of the call before
        opening, pending = (before + form.opening).lstrip(), self._pending.lstrip()
        name, found, rest = pending.removeprefix(opening).partition(form.between)
        if not pending.startswith(opening) or not found:
            return []
        self.calls.append(ReadCall(name))
        self._pending, self._end = rest, ObjectEnd()
        return [{"index": len(self.calls) - 1, **self.calls[-1].as_json()}]

    def _arguments(self, end: ObjectEnd) -> list[dict[str, Any]]:
        length = end.find(self._pending)
        arguments = self._pending[:length]
        self._pending = self._pending[len(arguments) :]
        if length is not None:
            self._end = None
        self.calls[-1].arguments += arguments
        return [{"index": len(self.calls) - 1, "function": {"arguments": arguments}}] if arguments else []
