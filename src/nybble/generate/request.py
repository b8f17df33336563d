"""What is asked of a generator, and what it answers.

Everything that makes tokens goes through here: chat, samples during training, evaluation, the parity gate, the demo and the
server. Messages, templates and text are above (`nybble.chat`), HTTP further above (`nybble.serve`).

The seed contract: a sampled token is a function of the logits, of the request's `seed` and of the token's position in the
sequence (prompt included), and of nothing else. So an answer does not depend on its neighbours in a batch, an answer that is
continued from its own first part stays the same, and a CUDA graph can draw it without a generator's state
(`nybble.generate.sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Finish = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Request:
    """One answer that is asked for. Temperature 0 is greedy; top_k 0 and top_p 1 leave nothing out."""

    prompt: Sequence[int]
    max_tokens: int
    adapter: str | None
    """Which adapter answers, by the name that the generator was given; None for the base itself. Requests of one batch may
    name different ones."""
    stop_ids: frozenset[int]
    """Tokens that end the answer; the one that does is handed over like any other."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    """None: drawn anew for each request."""
    logprobs: int | None = None
    """How many likeliest tokens to name beside each one; None for no log probabilities at all."""
    deadline: float | None = None
    """When to stop, whatever was made until then, in the time of `time.monotonic`."""


@dataclass(frozen=True)
class Token:
    """One token of an answer. Log probabilities are the model's own: of the logits before temperature, top_k and top_p."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class GenerationError(Exception):
    """An answer that could not be made; the message says why. `__cause__` is the error that stopped it, where there is one."""


class NonFiniteLogitsError(GenerationError):
    """A model that computes infinite or NaN logits."""

    def __init__(self) -> None:
        super().__init__("the model's logits are infinite or NaN; float16 overflows where bfloat16 does not")


class UnsupportedError(GenerationError):
    """A request that this generator cannot honour; `option` is the field of `Request`."""

    def __init__(self, option: str, why: str) -> None:
        super().__init__(why)
        self.option = option


class BusyError(Exception):
    """The queue is full; `seconds` is an estimate of when there will be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; room in about {seconds} s")
        self.seconds = seconds


class Sink(Protocol):
    """Where the tokens of one request go. Called from the generator's thread; must not block."""

    def put(self, token: Token) -> None:
        """One more token."""

    def end(self, finish: Finish) -> None:
        """No more will come; called once."""

    def fail(self, error: GenerationError) -> None:
        """No more can come; called once, in place of `end`."""


class Handle(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Stop as soon as possible, from any thread; the sink is told "cancelled"."""


class Generator(Protocol):
    """What makes tokens: queues requests from any thread, and computes in the thread that calls `step`."""

    vocabulary: int
    """Token ids go from 0 to one less."""
    positions: int
    """Tokens of prompt and answer together that the model was made for; it is the caller who keeps to it."""

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; from any thread.

        Raises:
            BusyError: the queue has no room for them.
            UnsupportedError: this kind of generator lacks an option that one of them names.
            GenerationError: a prompt without tokens or with ids beyond the vocabulary, an adapter that is not there, or the
                generator was closed.
        """

    def step(self) -> bool:
        """Compute some tokens of what is queued, and hand them to their sinks; False once nothing is left to do."""

    def close(self) -> None:
        """Cancel what runs and what waits, from any thread; what is computed just now ends with its next token."""


class Observer(Protocol):
    """What is told how busy a generator is, for metrics. Called from any thread; must not block."""

    def batch_began(self, rows: int) -> None:
        """A batch of so many requests is computed from here on."""

    def load_changed(self, running: int, waiting: int) -> None:
        """So many requests are being answered, and so many wait."""


class Unobserved:
    """An observer for those who want no metrics."""

    def batch_began(self, rows: int) -> None:
        """Ignore it."""

    def load_changed(self, running: int, waiting: int) -> None:
        """Ignore it."""


def check_request(request: Request, vocabulary: int, adapters: Container[str]) -> None:
    """Refuse what would fail a whole batch.

    Raises:
        GenerationError: an empty prompt, an id beyond the vocabulary, no token asked for, or an unknown adapter.
    """
    if not request.prompt:
        raise GenerationError("the prompt has no tokens")
    if request.max_tokens < 1:
        raise GenerationError(f"max_tokens is {request.max_tokens}; an answer has at least one token")
    odd = next((token_id for token_id in request.prompt if not 0 <= token_id < vocabulary), None)
    if odd is not None:
        raise GenerationError(f"the prompt has token {odd}, and the model's ids go from 0 to {vocabulary - 1:,}")
    if request.adapter is not None and request.adapter not in adapters:
        raise GenerationError(f"there is no adapter {request.adapter!r}")


@dataclass
class Completed:
    """A whole answer."""

    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def ids(self) -> list[int]:
        """Token ids, that of a stop included."""
        return [token.id for token in self.tokens]


@dataclass
class _Collector:
    """A sink that keeps everything, for those who wait for whole answers."""

    number: int
    on_token: Callable[[int, Token], None] | None
    completed: Completed = field(default_factory=Completed)
    error: GenerationError | None = None

    def put(self, token: Token) -> None:
        self.completed.tokens.append(token)
        if self.on_token is not None:
            self.on_token(self.number, token)

    def end(self, finish: Finish) -> None:
        self.completed.finish = finish

    def fail(self, error: GenerationError) -> None:
        self.error = error


def complete(
    generator: Generator, requests: Sequence[Request], on_token: Callable[[int, Token], None] | None = None
) -> list[Completed]:
    """Whole answers, computed in this thread.

    Args:
        generator: nobody else may be calling its `step`.
        requests: in any number; the generator makes its batches of them.
        on_token: is told each token as it comes, with the number of its request.

    Raises:
        GenerationError: an answer could not be made.
        KeyboardInterrupt: after all of them were cancelled.
    """
    sinks = [_Collector(number, on_token) for number in range(len(requests))]
    handles = generator.submit(requests, sinks)
    done = False
    try:
        while generator.step():
            pass
        done = True
    finally:
        if not done:
            for handle in handles:
                handle.cancel()
    for sink in sinks:
        if sink.error is not None:
            raise sink.error
    return [sink.completed for sink in sinks]
