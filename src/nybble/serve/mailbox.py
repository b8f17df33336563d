"""Passes tokens from the generator's thread to the event loop: the sinks of a request's answers, and the mailbox they post to."""

from __future__ import annotations

import asyncio
import contextlib

from nybble.generate.request import Finish, GenerationError, Handle, Token


class ShuttingDownError(GenerationError):
    """The server shuts down before the answer is complete."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class AnswerSink:
    """One answer's sink: the generator calls it from its thread, and the request's job reads from the mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.handle: Handle | None = None
        """For cancelling; set once the request was submitted."""
        self.finish: Finish | None = None
        """Why the answer ended; None until it does."""

    def put(self, token: Token) -> None:
        """Post a token."""
        self._mailbox.send(self, token)

    def end(self, finish: Finish) -> None:
        """Post that the answer has ended."""
        self.finish = finish
        self._mailbox.send(self, None)

    def fail(self, error: GenerationError) -> None:
        """Post that the answer failed."""
        self.finish = "cancelled"
        self._mailbox.send(self, error)

    def cancel(self) -> None:
        """Stop generating; tokens that were already posted can still be read."""
        if self.handle is not None:
            self.handle.cancel()


class Mailbox:
    """Receives the tokens of one request's answers, in the event loop in which it was created."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[AnswerSink, Token | None] | GenerationError] = asyncio.Queue()

    def send(self, answer: AnswerSink, item: Token | GenerationError | None) -> None:
        """Post an item, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody waits
            posted = item if isinstance(item, GenerationError) else (answer, item)
            self._loop.call_soon_threadsafe(self._items.put_nowait, posted)

    def abort(self, error: GenerationError) -> None:
        """Make the reader fail after it has read what was already posted; from the event loop."""
        self._items.put_nowait(error)

    async def take(self, deadline: float) -> tuple[AnswerSink, Token | None]:
        """The next token of any answer, or None if that answer has ended.

        Args:
            deadline: in the event loop's time.

        Raises:
            GenerationError: the generator failed.
            TimeoutError: the deadline has passed.
        """
        async with asyncio.timeout_at(deadline):
            item = await self._items.get()
        if isinstance(item, GenerationError):
            raise item
        return item
