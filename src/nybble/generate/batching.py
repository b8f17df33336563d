"""Requests gathered into batches of rows that come and go.

Rows of a batch need nothing in common but the base, and where adapters cannot be mixed the adapter: length, sampling, seed and
end are each row's own. A batch cannot take in a row midway, so with `patience` it gives way: once others wait, and once it has
made enough tokens to be worth the prompts that are computed again, it stops, and its unfinished rows go on in the next batch
together with the newcomers. Where rows cost nothing, the sooner the more of them could join in: one row with fifteen behind it
gives way after its first token. It does so too when half its rows have ended, as these are computed on with it. Without patience
a batch goes on until its last row ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nybble.generate.request import BusyError, Finish, GenerationError, Observer, Request, Sink, Token

REPEATED = 50  # tokens that stand in a batch already, for each one per row that it makes before it gives way


@dataclass(eq=False)
class ActiveRequest:
    """A request being answered, and the handle to it."""

    request: Request
    sink: Sink
    seed: int
    """The request's, or its own fresh one."""
    ids: list[int] = field(default_factory=list)
    """What it was answered so far."""
    cancelled: bool = False
    over: bool = False
    """Whether its sink was told that it ended or failed."""

    @property
    def prompt(self) -> list[int]:
        """What it goes on from."""
        return [*self.request.prompt, *self.ids]

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.request.max_tokens - len(self.ids)

    def cancel(self) -> None:
        """Stop as soon as possible; from any thread."""
        self.cancelled = True

    def take(self, token: Token) -> None:
        """One more token; ends the row where it says so."""
        if self.cancelled:
            self.end("cancelled")
            return
        self.ids.append(token.id)
        self.sink.put(token)
        if token.id in self.request.stop_ids:
            self.end("stop")
        elif self.left == 0:
            self.end("length")
        else:
            self.end_unwanted()

    def end_unwanted(self) -> None:
        """End it if nobody waits for it any more."""
        if self.cancelled:
            self.end("cancelled")
        elif self.request.deadline is not None and time.monotonic() >= self.request.deadline:
            self.end("deadline")

    def end(self, finish: Finish) -> None:
        """No more will come."""
        self.over = True
        self.sink.end(finish)

    def fail(self, error: GenerationError) -> None:
        """No more can come."""
        self.over = True
        self.sink.fail(error)


@dataclass
class GenerationBatch:
    """Rows that are computed together; `step` is called after every token."""

    rows: list[ActiveRequest]
    patience: int | None
    others_wait: Callable[[], bool]
    joiners: Callable[[Sequence[ActiveRequest]], int]
    """How many requests the next batch could take in beside these."""
    steps: int = 0

    def __post_init__(self) -> None:
        if self.patience is not None:
            self.patience = max(self.patience, sum(len(row.prompt) for row in self.rows) // REPEATED)

    def step(self, tokens: Sequence[Token]) -> list[bool]:
        """Hand one token to each row that goes on; which rows are to be left alone from here on."""
        self.steps += 1
        for row, token in zip(self.rows, tokens, strict=True):
            if not row.over:
                row.take(token)
        over = [row.over for row in self.rows]
        if self.patience is None:
            return over
        late = self.others_wait() or 2 * sum(over) >= len(over)
        if late and self.steps >= self.patience * len(over) / (len(over) + self.joiners(self.unfinished())):
            return [True] * len(over)
        return over

    def unfinished(self) -> list[ActiveRequest]:
        """Rows that go on in another batch."""
        return [row for row in self.rows if not row.over]


class Scheduler:
    """A bounded queue, and which of its requests are computed together.

    Args:
        rows: in a batch, at most.
        queue: requests that may wait; more are refused. None for any number.
        patience: tokens per row after which a batch gives way, or leaves ended rows behind, or one for every `REPEATED` that
            stand in it already if that is more. None for batches that go on until their last row ends.
        space: tokens, prompts and answers together, that fit into a batch's cache; None for batches that only `rows` bounds.
        mixes: whether rows of different adapters can be computed together; they are wherever those of one do not fill a batch.
        rows_are_free: whether a step takes as long for many rows as for one: on a GPU, which reads the weights once for all. On
            two cores SmolLM2 answers 26 tokens/s in batches of 8.7 rows and 24 in batches of 14.9.
    """

    def __init__(
        self,
        *,
        rows: int,
        queue: int | None,
        patience: int | None,
        space: int | None,
        mixes: bool,
        rows_are_free: bool,
        observer: Observer,
    ) -> None:
        self.rows, self.queue, self.patience, self.space = rows, queue, patience, space
        self.mixes, self.rows_are_free, self.observer = mixes, rows_are_free, observer
        self.waiting: deque[ActiveRequest] = deque()
        self.running: list[ActiveRequest] = []
        self.answered = 0
        """Requests that the last batch answered."""
        self.seconds_a_token = 0.0
        """How long a step of the last batch took."""
        self.seconds_a_row = 1.0
        self.closed = False
        self.lock = threading.Lock()

    def submit(self, rows: Sequence[ActiveRequest]) -> None:
        """Queue all of these, or none.

        Raises:
            BusyError: the queue has no room for them.
            GenerationError: it was closed.
        """
        with self.lock:
            if self.closed:
                raise GenerationError("the generator was closed")
            self._drop_unwanted()
            if self.queue is not None and sum(not row.ids for row in self.waiting) + len(rows) > self.queue:
                raise BusyError(max(1, round(len(self.waiting) * self.seconds_a_row)))
            self.waiting.extend(rows)
            self._report()

    def next(self) -> GenerationBatch | None:
        """The next batch, of those who have waited longest; None where nobody waits."""
        with self.lock:
            if not self._drop_unwanted():
                return None
            self.running = self._gather()
            self.waiting = deque(row for row in self.waiting if row not in self.running)
            self._report()
            return GenerationBatch(self.running, self.patience, self._others_wait, self._joiners)

    def finish(self, batch: GenerationBatch, seconds: float) -> bool:
        """Queue again what a batch left unfinished; whether anybody waits.

        Args:
            seconds: that it took.
        """
        with self.lock:
            self.running = []
            self.answered = sum(row.over for row in batch.rows)
            self.seconds_a_token = seconds / max(1, batch.steps)
            if self.answered:
                self.seconds_a_row = 0.7 * self.seconds_a_row + 0.3 * seconds / self.answered
            self.waiting.extend(batch.unfinished())  # behind those that wait, so that every adapter has its turn
            self._report()
            return bool(self._drop_unwanted())

    def fail_running(self, error: GenerationError) -> None:
        """Fail the requests of a batch that will not be finished."""
        with self.lock:
            stopped, self.running = [row for row in self.running if not row.over], []
            self.waiting = deque(row for row in self.waiting if row not in stopped)
        for row in stopped:
            row.fail(error)
        self._report()

    def halve_space(self, batch: GenerationBatch) -> None:
        """A batch did not fit into memory."""
        self.space = _tokens(batch.rows) // 2

    def close(self) -> None:
        """Cancel everything; rows at work are told with their next token."""
        with self.lock:
            self.closed = True
            for row in [*self.waiting, *self.running]:
                row.cancel()
            self._drop_unwanted()

    def _others_wait(self) -> bool:
        with self.lock:
            return bool(self._drop_unwanted())

    def _joiners(self, rows: Sequence[ActiveRequest]) -> int:
        """How many of those that wait would fit beside these rows, where it is worth asking."""
        if not rows or not self.rows_are_free:
            return 0
        adapter = rows[0].request.adapter
        with self.lock:
            waiting = [row for row in self.waiting if self.mixes or row.request.adapter == adapter]
            return len(self._fill(list(rows), waiting)) - len(rows)

    def _gather(self) -> list[ActiveRequest]:
        """Rows of the adapter that has waited longest, or of all where that one cannot fill a batch; in their order."""
        adapter = self.waiting[0].request.adapter
        own = self._fill([], [row for row in self.waiting if row.request.adapter == adapter])
        return own if not self.mixes or len(own) == self.rows else self._fill([], self.waiting)

    def _fill(self, rows: list[ActiveRequest], waiting: Iterable[ActiveRequest]) -> list[ActiveRequest]:
        """These rows and those that wait, as many as fit."""
        for row in waiting:
            if rows and (len(rows) >= self.rows or not self._fits([*rows, row])):
                break
            rows.append(row)
        return rows

    def _fits(self, rows: Sequence[ActiveRequest]) -> bool:
        return self.space is None or _tokens(rows) <= self.space

    def _drop_unwanted(self) -> int:
        """How many wait, without those for whom nobody waits any more."""
        for row in self.waiting:
            row.end_unwanted()
        if any(row.over for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.over)
            self._report()
        return len(self.waiting)

    def _report(self) -> None:
        self.observer.load_changed(len(self.running), len(self.waiting))


def _tokens(rows: Sequence[ActiveRequest]) -> int:
    """Tokens in a padded batch's cache, once every answer is as long as it may be."""
    return len(rows) * max(len(row.request.prompt) + row.request.max_tokens for row in rows)
