"""Chat completions whose answers may call functions."""

from __future__ import annotations

from typing import Any

from nybble.serve.answers import Choice, Job, Piece
from nybble.serve.bodies import CompletionReply, event
from nybble.serve.tools.calls import CallForm
from nybble.serve.tools.reader import CallReader


class ToolReply(CompletionReply):
    """As `CompletionReply`, with the calls in fields of their own.

    Args:
        job: whose answers it sends.
        form: how the model writes calls.
    """

    content_at_first = None  # an answer of calls has no content

    def __init__(self, job: Job, form: CallForm) -> None:
        super().__init__(job)
        self._readers = {choice.index: CallReader(form) for choice in job.choices}

    def piece(self, piece: Piece) -> list[bytes]:
        """The chunks of a piece of an answer, and of its end."""
        return [event(chunk) for chunk in self._chunks(piece)]

    def _message(self, choice: Choice) -> dict[str, Any]:
        reader = self._readers[choice.index]
        reader.push(choice.text, last=True)
        content = None if reader.calls and not reader.text else reader.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reader.calls:
            message["tool_calls"] = [call.as_json() for call in reader.calls]
        return message

    def _deltas(self, piece: Piece) -> list[dict[str, Any]]:
        text, calls = self._readers[piece.choice.index].push(piece.text, last=piece.choice.finish is not None)
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [call]} for call in calls]
        return deltas or ([{"content": ""}] if piece.tokens else [])

    def _finish(self, choice: Choice) -> str | None:
        # A stop string may have cut the last call: then its arguments are not whole, and nobody should make it.
        called = choice.finish == "stop" and self._readers[choice.index].is_complete
        return "tool_calls" if called else choice.finish
