"""Gathers requests into batches of rows.

The rows of a batch share the base and, if adapters cannot be mixed, the adapter; length, sampling, seed and end differ from row
to row. A running batch cannot take in another row, so with `patience` it gives way: once other requests wait and it has made
enough tokens to be worth recomputing its prompts, it stops, and its unfinished rows continue in the next batch together with the
new ones. If rows are free, it stops earlier the more requests could join: one row with fifteen waiting gives way after its first
token. A batch also gives way when half its rows have ended, as these would still be computed. Without patience a batch runs until
its last row ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nybble.generate.constraint import Constrain, Constraint, GrammarError
from nybble.generate.request import (
    BusyError,
    Finish,
    GenerationError,
    NonFiniteLogitsError,
    Observer,
    Request,
    Sink,
    Token,
    UnsupportedError,
)
from nybble.generate.seeds import fresh_seed

PROMPT_TOKENS_PER_STEP = 50  # before it gives way, a batch generates one token per row for every so many it began with


@dataclass(eq=False)
class ActiveRequest:
    """A request being answered, which is also its handle."""

    request: Request
    sink: Sink
    seed: int
    """The request's seed, or a fresh one."""
    answer_ids: list[int] = field(default_factory=list)
    """Token ids of the answer so far."""
    cancelled: bool = False
    begun: bool = False
    """Whether its sink has been notified that its prompt is computed."""
    ended: bool = False
    """Whether its sink has been notified of its end or failure."""
    constraint: Constraint | None = None
    """The state of the request's grammar."""

    @property
    def sequence(self) -> list[int]:
        """Token ids of the prompt and of the answer so far."""
        return [*self.request.prompt, *self.answer_ids]

    @property
    def tokens_left(self) -> int:
        """How many more tokens the answer may have."""
        return self.request.max_tokens - len(self.answer_ids)

    def cancel(self) -> None:
        """Stop as soon as possible; from any thread."""
        self.cancelled = True

    def begin(self, cached: int, prompt: Sequence[Token]) -> None:
        """Notify the sink that the prompt is computed, and end a request that wants no more than that. See `Sink.begin`."""
        if self.begun or self.ended:
            return
        self.begun = True
        self.sink.begin(cached, prompt)
        if self.tokens_left == 0:
            self.end("length")

    def add_token(self, token: Token) -> None:
        """Add a token to the answer, and end the answer if it is the last."""
        if self.cancelled:
            self.end("cancelled")
            return
        if self.constraint is not None:
            if token.id not in self.request.stop_ids:
                self.constraint.take(token.id)
            if self.constraint.error:
                self.fail(GrammarError(self.constraint.error))
                return
        self.answer_ids.append(token.id)
        self.sink.put(token)
        if token.id in self.request.stop_ids:
            self.end("stop")
        elif self.tokens_left == 0:
            self.end("length")
        else:
            self.end_if_unwanted()

    def receive(self, token: Token | None) -> None:
        """Add a token, or fail for want of one: the model's logits were not finite. Nothing where the answer has ended."""
        if self.ended:
            return
        if token is None:
            self.fail(NonFiniteLogitsError())
        else:
            self.add_token(token)

    def end_if_unwanted(self) -> None:
        """End it if it was cancelled or its deadline has passed."""
        if self.cancelled:
            self.end("cancelled")
        elif self.request.deadline is not None and time.monotonic() >= self.request.deadline:
            self.end("deadline")

    def end(self, finish: Finish) -> None:
        """Notify the sink that the answer has ended."""
        self.ended = True
        self.sink.end(finish)

    def fail(self, error: GenerationError) -> None:
        """Notify the sink that the answer failed."""
        self.ended = True
        self.sink.fail(error)


def activate(
    requests: Sequence[Request], sinks: Sequence[Sink], constrain: Constrain | None = None
) -> list[ActiveRequest]:
    """Requests with the states that they are answered from.

    Raises:
        GenerationError: a grammar cannot be followed.
        UnsupportedError: one has a grammar, and there are no constraints.
    """
    return [
        ActiveRequest(
            request,
            sink,
            fresh_seed() if request.seed is None else request.seed,
            constraint=None if request.grammar is None else _constraint(request, constrain),
        )
        for request, sink in zip(requests, sinks, strict=True)
    ]


def _constraint(request: Request, constrain: Constrain | None) -> Constraint:
    if constrain is None:
        raise UnsupportedError("grammar", "this generator has no grammars")
    return constrain(request)


@dataclass
class GenerationBatch:
    """Rows that are computed together; `step` is called after every token."""

    rows: list[ActiveRequest]
    patience: int | None
    others_wait: Callable[[], bool]
    count_joinable: Callable[[Sequence[ActiveRequest]], int]
    """How many waiting requests the next batch could add to these rows."""
    steps: int = 0

    def __post_init__(self) -> None:
        if self.patience is not None:
            self.patience = max(self.patience, sum(len(row.sequence) for row in self.rows) // PROMPT_TOKENS_PER_STEP)

    def step(self, tokens: Sequence[Token | None]) -> list[bool]:
        """Add one token to each unfinished row. Returns for each row whether the batch is done with it."""
        self.steps += 1
        for row, token in zip(self.rows, tokens, strict=True):
            row.receive(token)
        ended = [row.ended for row in self.rows]
        if self.patience is None:
            return ended
        may_stop = self.others_wait() or 2 * sum(ended) >= len(ended)
        if may_stop and self.steps >= self.patience * len(ended) / (
            len(ended) + self.count_joinable(self.unfinished())
        ):
            return [True] * len(ended)
        return ended

    def unfinished(self) -> list[ActiveRequest]:
        """Rows that continue in another batch."""
        return [row for row in self.rows if not row.ended]


class Scheduler:
    """A bounded queue that decides which of its requests are computed together.

    Args:
        rows: the most rows of a batch.
        queue: how many requests may wait; more are refused. None for any number.
        patience: tokens per row after which a batch gives way or drops its ended rows; or one for every `PROMPT_TOKENS_PER_STEP`
            tokens that it began with, if that is more. None for batches that run until their last row ends.
        token_budget: how many tokens, prompts and answers together, fit into a batch's cache; None if only `rows` limits a batch.
        mixes_adapters: whether rows of different adapters can be computed together; they are if those of one do not fill a batch.
        rows_are_free: whether a step takes as long for many rows as for one, as on a GPU, which reads the weights once for all.
            On two cores SmolLM2 answers 26 tokens/s in batches of 8.7 rows and 24 in batches of 14.9.
    """

    def __init__(
        self,
        *,
        rows: int,
        queue: int | None,
        patience: int | None,
        token_budget: int | None,
        mixes_adapters: bool,
        rows_are_free: bool,
        observer: Observer,
    ) -> None:
        self.rows, self.queue, self.patience, self.token_budget = rows, queue, patience, token_budget
        self.mixes_adapters, self.rows_are_free, self.observer = mixes_adapters, rows_are_free, observer
        self.waiting: deque[ActiveRequest] = deque()
        self.running: list[ActiveRequest] = []
        self.answered = 0
        """Requests that the last batch answered."""
        self.seconds_per_token = 0.0
        """How long a step of the last batch took."""
        self.seconds_per_answer = 1.0
        self.closed = False
        self.lock = threading.Lock()

    def submit(self, rows: Sequence[ActiveRequest]) -> None:
        """Queue all of these, or none.

        Raises:
            BusyError: the queue is too full for them.
            GenerationError: it was closed.
        """
        with self.lock:
            if self.closed:
                raise GenerationError("the generator was closed")
            self._drop_unwanted()
            if self.queue is not None and sum(not row.answer_ids for row in self.waiting) + len(rows) > self.queue:
                raise BusyError(max(1, round(len(self.waiting) * self.seconds_per_answer)))
            self.waiting.extend(rows)
            self._report()

    def next(self) -> GenerationBatch | None:
        """The next batch, of the requests that have waited longest; None if no request waits."""
        with self.lock:
            if not self._drop_unwanted():
                return None
            self.running = self._gather()
            self.waiting = deque(row for row in self.waiting if row not in self.running)
            self._report()
            return GenerationBatch(self.running, self.patience, self._others_wait, self._count_joinable)

    def finish(self, batch: GenerationBatch, seconds: float) -> bool:
        """Queue a batch's unfinished rows again. Returns whether any request waits.

        Args:
            batch: the batch.
            seconds: how long it took.
        """
        with self.lock:
            self.running = []
            self.answered = sum(row.ended for row in batch.rows)
            self.seconds_per_token = seconds / max(1, batch.steps)
            if self.answered:
                self.seconds_per_answer = 0.7 * self.seconds_per_answer + 0.3 * seconds / self.answered
            self.waiting.extend(batch.unfinished())  # behind the others, so that every adapter gets its turn
            self._report()
            return bool(self._drop_unwanted())

    def fail_running(self, error: GenerationError) -> None:
        """Fail the requests of a batch that will not be finished."""
        with self.lock:
            stopped, self.running = [row for row in self.running if not row.ended], []
            self.waiting = deque(row for row in self.waiting if row not in stopped)
        for row in stopped:
            row.fail(error)
        self._report()

    def halve_budget(self, batch: GenerationBatch) -> None:
        """Reduce the token budget to half of a batch that did not fit into memory."""
        self.token_budget = _tokens(batch.rows) // 2

    def close(self) -> None:
        """Cancel everything; running rows end with their next token."""
        with self.lock:
            self.closed = True
            for row in [*self.waiting, *self.running]:
                row.cancel()
            self._drop_unwanted()

    def _others_wait(self) -> bool:
        with self.lock:
            return bool(self._drop_unwanted())

    def _count_joinable(self, rows: Sequence[ActiveRequest]) -> int:
        """How many of the waiting requests would fit beside these rows; 0 if joining them would gain nothing."""
        if not rows or not self.rows_are_free:
            return 0
        adapter = rows[0].request.adapter
        with self.lock:
            waiting = [row for row in self.waiting if self.mixes_adapters or row.request.adapter == adapter]
            return len(self._fill(list(rows), waiting)) - len(rows)

    def _gather(self) -> list[ActiveRequest]:
        """Rows of the adapter that has waited longest, or of all adapters if that one cannot fill a batch; in queue order."""
        adapter = self.waiting[0].request.adapter
        same_adapter = self._fill([], [row for row in self.waiting if row.request.adapter == adapter])
        if not self.mixes_adapters or len(same_adapter) == self.rows:
            return same_adapter
        return self._fill([], self.waiting)

    def _fill(self, rows: list[ActiveRequest], waiting: Iterable[ActiveRequest]) -> list[ActiveRequest]:
        """These rows and as many of the waiting ones as fit."""
        for row in waiting:
            if rows and (len(rows) >= self.rows or not self._fits([*rows, row])):
                break
            rows.append(row)
        return rows

    def _fits(self, rows: Sequence[ActiveRequest]) -> bool:
        return self.token_budget is None or _tokens(rows) <= self.token_budget

    def _drop_unwanted(self) -> int:
        """Drop requests that were cancelled or are past their deadline. Returns how many still wait."""
        for row in self.waiting:
            row.end_if_unwanted()
        if any(row.ended for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.ended)
            self._report()
        return len(self.waiting)

    def _report(self) -> None:
        self.observer.load_changed(len(self.running), len(self.waiting))


def _tokens(rows: Sequence[ActiveRequest]) -> int:
    """Tokens in a padded batch's cache when every answer has its maximum length."""
    return len(rows) * max(len(row.request.prompt) + row.request.max_tokens for row in rows)
