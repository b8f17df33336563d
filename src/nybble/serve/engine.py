"""What the API serves: models by name, each with its template, and the thread that makes their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nybble.data.text.template import Template
from nybble.generate.request import Request
from nybble.generate.worker import Worker
from nybble.serve.mailbox import AnswerSink, Mailbox


@dataclass(frozen=True)
class ServedModel:
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
    adapter: str | None = None
    """Which of the generator's adapters answers; None for its model as it is."""
    system: str = ""
    """The system message that most training rows begin with."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.ends


@dataclass(frozen=True)
class Engine:
    """Models and what generates for them."""

    name: str
    about: str
    """Why this one, and what it does not batch together: a line for the terminal."""
    models: dict[str, ServedModel]
    """By the name that requests choose them by."""
    adapters: Mapping[str, str]
    """What each run's adapter changes, by the run's name."""
    queue: int
    """Answers that may wait: no request can ask for more."""
    worker: Worker

    def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[AnswerSink]:
        """Take all of these, or none; their tokens come to the mailbox.

        Raises:
            BusyError: there is no room for them.
            UnsupportedError: an option that this engine cannot honour.
            GenerationError: the engine is closed, or broke down.
        """
        answers = [AnswerSink(mailbox) for _ in requests]
        for answer, handle in zip(answers, self.worker.submit(requests, answers), strict=True):
            answer.handle = handle
        return answers

    def healthy(self) -> bool:
        """Whether answers can be made."""
        return self.worker.healthy()

    def close(self) -> None:
        """Break off what runs, and end the thread."""
        self.worker.close()
