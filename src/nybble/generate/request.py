"""The interface of all generators: requests in, tokens out.

Everything that needs generated tokens uses it: chat, samples during training, evaluation, the parity gate, the demo and the
server. Messages, templates and text are one level up (`nybble.chat`), HTTP another (`nybble.serve`).

The seed contract: a sampled token is a function of the logits, of the request's `seed` and of the token's position in the
sequence (prompt included), and of nothing else. So an answer does not depend on its neighbours in a batch, an answer that is
continued from its own first part stays the same, and a CUDA graph can sample it without a random generator's state
(`nybble.generate.sampling`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Finish = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Request:
    """A request for one answer. Temperature 0 is greedy; top_k 0 and top_p 1 filter nothing.

    Biases and penalties come first, then temperature, then the filters.
    """

    prompt: Sequence[int]
    max_tokens: int
    """0 computes the prompt only."""
    adapter: str | None
    """The generator's name of the adapter that answers; None for the base. Requests of one batch may name different ones."""
    stop_ids: frozenset[int]
    """Tokens that end the answer; the sink receives them like any other."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """The least probability of a token, as a share of the likeliest token's (Nguyen et al. 2024); 0 filters nothing."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens in prompt or answer; 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the token is in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their logits."""
    grammar: str | None = None
    """What the answer must follow, in the form that the generator's constraints are made from; None for anything."""
    seed: int | None = None
    """None for a fresh random seed."""
    logprobs: int | None = None
    """How many of the likeliest tokens to return with each token; None for no log probabilities at all."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to return with each token of the prompt; None for nothing about the prompt."""
    deadline: float | None = None
    """When to stop, however long the answer is by then, in the time of `time.monotonic`."""


@dataclass(frozen=True)
class Token:
    """One token of an answer. Log probabilities are the model's own: of its logits, before anything that a request changes."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class GenerationError(Exception):
    """An answer that could not be generated; the message says why. `__cause__` is the error that stopped it, if any."""


class NonFiniteLogitsError(GenerationError):
    """A model that computes infinite or NaN logits."""

    def __init__(self) -> None:
        super().__init__("the model's logits are infinite or NaN; float16 overflows where bfloat16 does not")

    def __reduce__(self) -> tuple[type[NonFiniteLogitsError], tuple[()]]:
        """For pickle: errors cross processes."""
        return NonFiniteLogitsError, ()


class UnsupportedError(GenerationError):
    """A request that this generator cannot honour; `option` is the field of `Request`."""

    def __init__(self, option: str, why: str) -> None:
        super().__init__(why)
        self.option = option

    def __reduce__(self) -> tuple[type[UnsupportedError], tuple[str, str]]:
        """For pickle: errors cross processes."""
        return UnsupportedError, (self.option, str(self))


class BusyError(Exception):
    """The queue is full; `seconds` is an estimate of how long it will be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in about {seconds} s")
        self.seconds = seconds

    def __reduce__(self) -> tuple[type[BusyError], tuple[int]]:
        """For pickle: errors cross processes."""
        return BusyError, (self.seconds,)


class Sink(Protocol):
    """Receives the tokens of one request. Called from the generator's thread; must not block."""

    def begin(self, cached: int, prompt: Sequence[Token]) -> None:
        """The prompt is computed; called once before the first token, or before `end` if `max_tokens` is 0.

        Args:
            cached: how many of its tokens did not have to be computed, as a sequence before it began alike.
            prompt: its tokens if `prompt_logprobs` asks for them, the first without a log probability; else empty.
        """

    def put(self, token: Token) -> None:
        """Receive the next token."""

    def end(self, finish: Finish) -> None:
        """The answer has ended; called once."""

    def fail(self, error: GenerationError) -> None:
        """The answer failed; called once, instead of `end`."""


class Handle(Protocol):
    """A submitted request, which can be cancelled."""

    def cancel(self) -> None:
        """Stop as soon as possible, from any thread; the sink's `end` is called with "cancelled"."""


class Generator(Protocol):
    """Generates tokens: queues requests from any thread, and computes in the thread that calls `step`."""

    vocabulary: int
    """The vocabulary size: token ids are below it."""
    positions: int
    """The model's context length, prompt and answer together; the caller must respect it."""

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; from any thread.

        Raises:
            BusyError: the queue is too full for them.
            UnsupportedError: this kind of generator lacks an option that one of them uses.
            GenerationError: a prompt without tokens or with ids beyond the vocabulary, an unknown adapter, or the generator was
                closed.
        """

    def step(self) -> bool:
        """Compute some tokens for queued requests, and pass them to their sinks; False once nothing is left to do."""

    def close(self) -> None:
        """Cancel running and waiting requests, from any thread; what is being computed ends with its next token."""


class Observer(Protocol):
    """Is notified of a generator's load, for metrics. Called from any thread; must not block."""

    def batch_started(self, rows: int) -> None:
        """The computation of a batch of so many requests has started."""

    def load_changed(self, running: int, waiting: int) -> None:
        """So many requests are running, and so many wait."""


class NullObserver:
    """An observer that ignores everything."""

    def batch_started(self, rows: int) -> None:
        """Ignore it."""

    def load_changed(self, running: int, waiting: int) -> None:
        """Ignore it."""


def check_request(request: Request, vocabulary: int, adapters: Container[str]) -> None:
    """Refuse a request that would make its whole batch fail.

    Raises:
        GenerationError: an empty prompt, an id beyond the vocabulary in prompt or logit_bias, max_tokens below zero, or an
            unknown adapter.
    """
    if not request.prompt:
        raise GenerationError("the prompt has no tokens")
    if request.max_tokens < 0:
        raise GenerationError(f"max_tokens is {request.max_tokens}; it is a number of tokens")
    invalid = next((token_id for token_id in request.prompt if not 0 <= token_id < vocabulary), None)
    if invalid is not None:
        raise GenerationError(f"the prompt has token {invalid}, but the model's ids go from 0 to {vocabulary - 1:,}")
    unknown = next((token_id for token_id, _ in request.logit_bias if not 0 <= token_id < vocabulary), None)
    if unknown is not None:
        raise GenerationError(f"logit_bias names token {unknown}, but the model's ids go from 0 to {vocabulary - 1:,}")
    if request.adapter is not None and request.adapter not in adapters:
        raise GenerationError(f"there is no adapter {request.adapter!r}")


@dataclass
class Completed:
    """A complete answer."""

    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0
    """How many tokens of the prompt did not have to be computed."""
    prompt: Sequence[Token] = ()
    """The prompt's tokens, if the request asks for them."""

    @property
    def ids(self) -> list[int]:
        """Token ids, including the stop token."""
        return [token.id for token in self.tokens]


@dataclass
class _Collector:
    """A sink that collects a complete answer."""

    number: int
    on_token: Callable[[int, Token], None] | None
    completed: Completed = field(default_factory=Completed)
    error: GenerationError | None = None

    def begin(self, cached: int, prompt: Sequence[Token]) -> None:
        self.completed.cached, self.completed.prompt = cached, prompt

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
    """Complete answers, computed in this thread.

    Args:
        generator: no other thread may call its `step`.
        requests: any number of them; the generator batches them.
        on_token: called for each token as it is generated, with the number of its request.

    Raises:
        GenerationError: an answer could not be generated.
        KeyboardInterrupt: after all requests were cancelled.
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
