"""What the API serves: models by name, each with its template, and the worker that generates for them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nybble.data.text.template import Template
from nybble.generate.request import Handle, Request, Sink
from nybble.serve.mailbox import AnswerSink, Mailbox


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can choose with the field `model`."""

    name: str
    template: Template
    """With its tokenizer, as in training."""
    positions: int
    """The context length: tokens of prompt and answer together."""
    parent: str | None
    """The base that a run was tuned from; None for the base itself."""
    rows: int
    """The number of embedding rows: token ids are below it."""
    adapter: str | None = None
    """The generator's adapter that answers; None for the model without one."""
    system: str = ""
    """The system message of most training rows."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.ends


class AnswerWorker(Protocol):
    """Generates, in a thread of this process (`InThread`) or in a process of its own (`RemoteWorker`)."""

    async def start(self) -> None:
        """Called once, in the event loop that will submit."""

    async def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; if this is cancelled, so are they.

        Raises:
            BusyError: the queue is too full for them.
            UnsupportedError: an option that this engine does not support.
            GenerationError: the engine is closed, or has failed.
        """

    def healthy(self) -> bool:
        """Whether it can answer requests."""

    async def stop(self) -> None:
        """Called once in the event loop, after the last answer."""

    def close(self) -> None:
        """Cancel what is running, and wait for the end; after `stop` if it was started."""


@dataclass(frozen=True)
class Engine:
    """Models and the worker that generates for them."""

    name: str
    about: str
    """A line for the terminal: what the engine is, and how it batches."""
    models: dict[str, ServedModel]
    """By the name with which requests choose them."""
    adapters: Mapping[str, str]
    """What each run's adapter changes, by the run's name."""
    queue: int
    """How many answers may wait: no request can ask for more."""
    worker: AnswerWorker
    folder: pathlib.Path
    """Of the base, whose tokenizer adapters without one of their own have."""

    async def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[AnswerSink]:
        """Submit all of these, or none; their tokens are posted to the mailbox.

        Raises:
            BusyError, UnsupportedError, GenerationError: as `AnswerWorker.submit`.
        """
        answers = [AnswerSink(mailbox) for _ in requests]
        for answer, handle in zip(answers, await self.worker.submit(requests, answers), strict=True):
            answer.handle = handle
        return answers

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return self.worker.healthy()

    def close(self) -> None:
        """Cancel what is running, and wait for the end."""
        self.worker.close()
