"""Passes tokens from the generator to the event loop: the sinks of a request's answers, and the mailbox they post to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence

from nybble.generate.request import Finish, GenerationError, Handle, Token


class ShuttingDownError(GenerationError):
    """The server shuts down before the answer is complete."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class AnswerSink:
    """One answer's sink: tokens come from the generator's thread or the event loop, and its job reads from the mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.handle: Handle | None = None
        """For cancelling; set once the request was submitted."""
        self.finish: Finish | None = None
        """Why the answer ended; None until it does."""
        self.cached = 0
        """How many tokens of the prompt did not have to be computed; known once there is a token."""
        self.prompt: Sequence[Token] = ()
        """The prompt's tokens with log probabilities, if they were asked for; known once there is a token or the end."""

    def begin(self, cached: int, prompt: Sequence[Token]) -> None:
        """Keep what there is to say of the prompt."""
        self.cached, self.prompt = cached, prompt

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
    """Receives the tokens of one request's answers, in the event loop in which it was created.

    Args:
        deadline: in the event loop's time, after which its reader gets a TimeoutError.
    """

    def __init__(self, deadline: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._items: deque[tuple[AnswerSink, Token | None] | GenerationError] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._is_late = False
        # One timer for all tokens: asyncio.timeout around each would cost as much as everything else here.
        self._timer = self._loop.call_at(deadline, self._expire)

    def send(self, answer: AnswerSink, item: Token | GenerationError | None) -> None:
        """Post an item, from any thread."""
        posted = item if isinstance(item, GenerationError) else (answer, item)
        if threading.get_ident() == self._thread:
            self._post(posted)
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._post, posted)

    def abort(self, error: GenerationError) -> None:
        """Make the reader fail after it has read what was already posted; from the event loop."""
        self._post(error)

    def close(self) -> None:
        """Nobody reads any more; from the event loop."""
        self._timer.cancel()

    async def take(self) -> tuple[AnswerSink, Token | None]:
        """The next token of any answer, or None if that answer has ended. One reader at a time.

        Raises:
            GenerationError: the generator failed.
            TimeoutError: the deadline has passed.
        """
        while not self._items and not self._is_late:
            self._arrival = self._loop.create_future()
            await self._arrival
        if self._is_late:
            raise TimeoutError
        item = self._items.popleft()
        if isinstance(item, GenerationError):
            raise item
        return item

    def _post(self, item: tuple[AnswerSink, Token | None] | GenerationError) -> None:
        self._items.append(item)
        self._wake()

    def _expire(self) -> None:
        self._is_late = True
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done() and not self._loop.is_closed():
            self._arrival.set_result(None)
