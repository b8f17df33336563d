"""What the server and its generator's process say to each other: pickled messages, each after its length.

The connection is a pair of sockets that no other process has, so what is unpickled was pickled by nybble itself.
"""

from __future__ import annotations

import logging
import pathlib
import pickle
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.generate.request import Finish, GenerationError, Request, Token

LENGTH = struct.Struct("!Q")
READ = 2**18  # bytes taken from the connection at once, as asyncio does


@dataclass(frozen=True)
class PromptFacts:
    """What a sink's `begin` is called with."""

    cached: int
    prompt: Sequence[Token]


Item = PromptFacts | int | Token | Finish | GenerationError
"""That a prompt is computed, the id of a token without log probabilities, a token with them, why an answer ended, or why it
failed."""


@dataclass(frozen=True)
class LoadingJob:
    """What the process loads. Functions are named, as `module:function`, so that the server need not import what they need."""

    load: str
    """Called with the observer and `arguments`; returns an `Engine` whose worker is an `InThread`."""
    arguments: dict[str, Any]
    prepare: str = ""
    """Called before the module of `load` is imported."""


@dataclass(frozen=True)
class FirstMessage:
    """The first message to the process."""

    path: list[str]
    """Where the server finds its modules."""
    job: bytes
    """A pickled `LoadingJob`, to be unpickled once `path` is set."""


@dataclass(frozen=True)
class Submission:
    """Requests to queue, all or none."""

    number: int
    requests: list[tuple[int, Request]]
    """Each with the number of its answer."""


@dataclass(frozen=True)
class Cancellation:
    """Answers that nobody waits for any more."""

    answers: list[int]


@dataclass(frozen=True)
class ModelFacts:
    """A `ServedModel` without its template."""

    name: str
    positions: int
    parent: str | None
    rows: int
    adapter: str | None
    system: str


@dataclass(frozen=True)
class EngineFacts:
    """What the server must know of the engine that the process has loaded."""

    name: str
    about: str
    models: list[ModelFacts]
    adapters: Mapping[str, str]
    folder: pathlib.Path
    """Of the base, whose tokenizer adapters without one of their own have."""


@dataclass
class Report:
    """What has happened in the process since the last report: after a step, everything that it made."""

    items: list[tuple[int, Item]] = field(default_factory=list)
    """By answer, in order."""
    replies: list[tuple[int, Exception | None]] = field(default_factory=list)
    """By submission: None if it was queued, else why not."""
    batches: list[int] = field(default_factory=list)
    """Rows of the batches that were started."""
    load: tuple[int, int] | None = None
    """Requests that run and that wait, if this has changed."""
    records: list[logging.LogRecord] = field(default_factory=list)
    loaded: EngineFacts | None = None
    not_loaded: BaseException | None = None
    """Why the engine could not be loaded; the process ends."""
    healthy: bool | None = None
    """Whether the generator can answer, if this has changed."""
    why_ended: str = ""
    """Why the process ends although the server goes on, as the rest of a sentence and perhaps a traceback."""


def pack(message: Any) -> bytes:
    """A message as bytes."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


class Unpacker:
    """Makes messages of bytes as they arrive."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with these bytes."""
        self._pending += data
        messages: list[Any] = []
        begin = 0
        while len(self._pending) - begin >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._pending, begin)
            end = begin + LENGTH.size + length
            if end > len(self._pending):
                break
            with memoryview(self._pending) as view:
                messages.append(pickle.loads(view[begin + LENGTH.size : end]))
            begin = end
        del self._pending[:begin]
        return messages


def receive(connection: socket.socket, unpacker: Unpacker) -> list[Any] | None:
    """Wait for the next messages; None once the other side has ended."""
    while True:
        try:
            data = connection.recv(READ)
        except ConnectionError:
            return None
        if not data:
            return None
        if messages := unpacker.feed(data):
            return messages
