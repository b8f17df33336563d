"""From the generator's thread into the event loop: the sinks of a request's answers, and the mailbox that they post to."""

from __future__ import annotations

import asyncio
import contextlib

from nybble.generate.request import Finish, GenerationError, Handle, Token


class ShuttingDownError(GenerationError):
    """The server ends before the answer does."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class AnswerSink:
    """One answer under way: a sink, which the generator writes from its thread and the reader finds in the mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.handle: Handle | None = None
        """To cancel it by; set once it was submitted."""
        self.finish: Finish | None = None
        """Why it ended; None as long as it goes on."""

    def put(self, token: Token) -> None:
        """Hand a token over."""
        self._mailbox.send(self, token)

    def end(self, finish: Finish) -> None:
        """Say that no more will come."""
        self.finish = finish
        self._mailbox.send(self, None)

    def fail(self, error: GenerationError) -> None:
        """Say that no more can come."""
        self.finish = "cancelled"
        self._mailbox.send(self, error)

    def cancel(self) -> None:
        """Stop generating; what has come already can still be read."""
        if self.handle is not None:
            self.handle.cancel()


class Mailbox:
    """Where the tokens of one request's answers arrive, in the event loop that it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[AnswerSink, Token | None] | GenerationError] = asyncio.Queue()

    def send(self, answer: AnswerSink, item: Token | GenerationError | None) -> None:
        """Put something in; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended, and nobody waits
            found = item if isinstance(item, GenerationError) else (answer, item)
            self._loop.call_soon_threadsafe(self._items.put_nowait, found)

    def break_off(self, error: GenerationError) -> None:
        """Have the reader fail once it has read what is there; from the event loop."""
        self._items.put_nowait(error)

    async def take(self, deadline: float) -> tuple[AnswerSink, Token | None]:
        """The next token of any answer, or None where that answer has ended.

        Args:
            deadline: in the event loop's time.

        Raises:
            GenerationError: the generator failed.
            TimeoutError: the deadline has passed.
        """
        async with asyncio.timeout_at(deadline):
            found = await self._items.get()
        if isinstance(found, GenerationError):
            raise found
        return found
