"""The seam between the API and what makes tokens.

An engine knows token ids and nothing else: no text, no template, no HTTP. It takes requests and hands tokens over as they come;
the API turns messages into ids before, and ids into text after (so it is the API that finds stop strings, and cancels).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nybble.data.text.template import Template

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Model:
    """One value of the API's model field."""

    name: str
    template: Template
    """With the tokenizer, as the run was trained with it."""
    positions: int
    """Tokens of prompt and answer together."""
    parent: str | None
    """The base that a run was tuned from; None for the base itself."""
    rows: int
    """Of the embedding: token ids go from 0 to one less."""
    system: str = ""
    """The system message that most training rows begin with."""


@dataclass(frozen=True)
class Request:
    """One answer that is asked for. Temperature 0 is greedy, top_k 0 and top_p 1 leave nothing out."""

    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None
    """How many likeliest tokens to name beside each one; None: no log probabilities at all."""


@dataclass(frozen=True)
class Token:
    """One token of an answer. Log probabilities are the model's own: of the logits before temperature, top_k and top_p."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class BusyError(Exception):
    """The queue is full; `seconds` is a guess at when there is room again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; room in about {seconds} s")
        self.seconds = seconds


class GenerationError(Exception):
    """An answer that could not be made; the message says why."""

    code = "engine_failed"


class ShuttingDownError(GenerationError):
    """The server ends before the answer does."""

    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Answer:
    """One answer under way; the engine writes it, from any thread, and its reader finds it in the mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self.when_cancelled: Callable[[], None] | None = None
        """What an engine does that has no look at `cancelled` of its own."""
        self.finish: Finish | None = None
        """Why it ended; None as long as it goes on."""
        self.cancelled = False
        """Whether nobody waits for it any more: the engine looks here at every token."""

    def put(self, token: Token) -> None:
        """Hand a token over."""
        self._mailbox.send(self, token)

    def end(self, finish: Finish) -> None:
        """Say that no more will come."""
        self.finish = finish
        self._mailbox.send(self, None)

    def fail(self, reason: str) -> None:
        """Say that no more can come."""
        self.finish = "cancelled"
        self._mailbox.send(self, GenerationError(reason))

    def cancel(self) -> None:
        """Stop generating; what has come already can still be read."""
        self.cancelled = True
        if self.when_cancelled is not None:
            self.when_cancelled()


class Mailbox:
    """Where the tokens of one request's answers arrive, in the event loop that it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[Answer, Token | None] | GenerationError] = asyncio.Queue()

    def send(self, answer: Answer, item: Token | GenerationError | None) -> None:
        """Put something in; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended, and nobody waits
            found = item if isinstance(item, GenerationError) else (answer, item)
            self._loop.call_soon_threadsafe(self._items.put_nowait, found)

    def break_off(self, error: GenerationError) -> None:
        """Have the reader fail once it has read what is there; from the event loop."""
        self._items.put_nowait(error)

    async def take(self, deadline: float) -> tuple[Answer, Token | None]:
        """The next token of any answer, or None where that answer has ended.

        Args:
            deadline: in the event loop's time.

        Raises:
            GenerationError: the engine failed.
            TimeoutError: the deadline has passed.
        """
        async with asyncio.timeout_at(deadline):
            found = await self._items.get()
        if isinstance(found, GenerationError):
            raise found
        return found


class Engine(Protocol):
    """What makes tokens."""

    name: str
    queue: int
    """Answers that may wait: no request can ask for more."""
    about: str
    """Why this one, and what it does not batch together: a line for the terminal."""

    @property
    def adapters(self) -> Mapping[str, str]:
        """What each run's adapter changes, by the run's name."""

    @property
    def models(self) -> Mapping[str, Model]:
        """By the name that requests choose them by."""

    def refuses(self, request: Request) -> tuple[str, str] | None:
        """An option that this engine cannot honour, and why; None where it can do all."""

    def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[Answer]:
        """Take all of these, or none; their tokens come to the mailbox.

        Raises:
            BusyError: there is no room for them.
            GenerationError: the engine is closed, or broke down.
        """

    def healthy(self) -> bool:
        """Whether answers can be made."""

    def close(self) -> None:
        """Break off what runs, and free the device."""
