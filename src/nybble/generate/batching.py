"""Requests gathered into batches: one thread, one model at a time, rows that come and go.

A batch is made of requests for one model (one adapter), in the order they came. Nothing else has to be alike: length,
sampling, seed and end are each row's own. A batch cannot take in a row midway, so it gives way: once others wait, and once it
has made enough tokens to be worth the prompts that are computed again, it stops, and its unfinished rows go on in the next
batch together with the newcomers. Where rows cost nothing, the sooner the more of them could join in: one row with fifteen behind
it gives way after its first token. It does so too when half its rows have ended, as these are computed on with it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from nybble.serve.mailbox import Answer, BusyError, GenerationError, Mailbox, Request, ShuttingDownError, Token
from nybble.serve.metrics import Metrics

log = logging.getLogger("nybble.serve")
ROWS = 32  # in a batch; 4-bit weights are read once for all of them
GATHER = 0.01  # seconds an idle engine waits for requests that come together
# Seconds that a busy one waits, at most, for clients that were just answered to ask again: a token's time. Without it 16
# clients fall into two groups that take turns in batches of 8 (SmolLM2 on two cores: a mean of 7.8 rows).
RETURN = 0.3
# A batch gives way, or leaves ended rows behind, after so many tokens per row, or one for every 50 that stand in it already if
# that is more.
PATIENCE, REPEATED = 16, 50


@dataclass(eq=False)
class Row:
    """A request at work."""

    request: Request
    answer: Answer
    ends: frozenset[int]
    """Tokens that end an answer."""
    random: random.Random
    """Draws of this row alone, so that a seeded answer does not depend on its neighbours."""
    ids: list[int] = field(default_factory=list)
    """What it was answered so far."""

    @property
    def prompt(self) -> list[int]:
        """What it goes on from."""
        return self.request.prompt + self.ids

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.request.max_tokens - len(self.ids)

    def take(self, token: Token) -> None:
        """One more token; ends the row where it says so."""
        if self.answer.cancelled:
            self.answer.end("cancelled")
            return
        self.ids.append(token.id)
        self.answer.put(token)
        if token.id in self.ends:
            self.answer.end("stop")
        elif self.left == 0:
            self.answer.end("length")


@dataclass
class Batch:
    """Rows of one model that are generated together; the engine calls `step` after every token."""

    model: str
    rows: list[Row]
    others_wait: Callable[[], bool]
    joiners: Callable[[Sequence[Row]], int]
    """How many requests the next batch could take in beside these."""
    steps: int = 0

    def __post_init__(self) -> None:
        self.patience = max(PATIENCE, sum(len(row.prompt) for row in self.rows) // REPEATED)

    def step(self, tokens: Sequence[Token]) -> list[bool]:
        """Hand one token to each row that goes on; which rows are to be left alone from here on."""
        self.steps += 1
        for row, token in zip(self.rows, tokens, strict=True):
            if row.answer.finish is None:
                row.take(token)
        over = [row.answer.finish is not None for row in self.rows]
        late = self.others_wait() or 2 * sum(over) >= len(over)
        if late and self.steps >= self.patience * len(over) / (len(over) + self.joiners(self.unfinished())):
            return [True] * len(over)
        return over

    def unfinished(self) -> list[Row]:
        """Rows that go on in another batch."""
        return [row for row in self.rows if row.answer.finish is None]


class Batcher:
    """A bounded queue, and the thread that makes batches of what waits in it.

    Args:
        generate: computes a batch, calling `Batch.step` after each token.
        ends: tokens that end an answer, by model.
        queue: requests that may wait; more are refused.
        room: tokens, prompts and answers together, that fit into a batch's cache.
        rows_are_free: whether a step takes as long for many rows as for one: on a GPU, which reads the weights once for all. On
            two cores SmolLM2 answers 26 tokens/s in batches of 8.7 rows and 24 in batches of 14.9.
    """

    def __init__(
        self,
        generate: Callable[[Batch], None],
        ends: dict[str, frozenset[int]],
        metrics: Metrics,
        *,
        queue: int,
        room: int,
        rows_are_free: bool,
    ) -> None:
        self.generate, self.ends, self.metrics, self.queue, self.room = generate, ends, metrics, queue, room
        self.rows_are_free = rows_are_free
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.seconds_a_row = 1.0
        self.answered = 0
        self.pause = 0.0
        self.closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="nybble-batches", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[Answer]:
        """Put requests into the queue, all or none."""
        rows = [
            Row(request, Answer(mailbox), self.ends[request.model], random.Random(request.seed)) for request in requests
        ]
        with self.changed:
            if self.closing or not self.thread.is_alive():
                raise ShuttingDownError if self.closing else GenerationError("the engine failed")
            self._drop_cancelled()
            if sum(not row.ids for row in self.waiting) + len(rows) > self.queue:
                raise BusyError(max(1, round(len(self.waiting) * self.seconds_a_row)))
            self.waiting.extend(rows)
            self._count()
            self.changed.notify()
        return [row.answer for row in rows]

    def close(self) -> None:
        """Break off everything; returns when the thread has ended."""
        with self.changed:
            self.closing = True
            for row in [*self.waiting, *self.running]:
                row.answer.cancel()
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                began = time.perf_counter()
                self._run(batch)
                seconds = time.perf_counter() - began
                self.answered = sum(row.answer.finish is not None for row in batch.rows)
                self.pause = min(RETURN, seconds / max(1, batch.steps))
                if self.answered:
                    self.seconds_a_row = 0.7 * self.seconds_a_row + 0.3 * seconds / self.answered
        finally:  # whatever happened, nobody is left waiting
            with self.changed:
                for row in [*self.waiting, *self.running]:
                    if row.answer.finish is None:
                        row.answer.fail("the engine stopped")
                self.waiting.clear()
                self.running = []
                self._count()

    def _run(self, batch: Batch) -> None:
        """One batch; one that fails takes its own requests along, and nothing else."""
        try:
            self.generate(batch)
        except torch.OutOfMemoryError:
            if len(batch.rows) > 1:
                self.room = _tokens(batch.rows) // 2
                log.warning(
                    "out of memory with %d answers; a batch now has room for %d tokens", len(batch.rows), self.room
                )
            else:
                batch.rows[0].answer.fail("out of memory: the prompt is too long for this device")
        except (RuntimeError, ValueError, IndexError):
            log.exception("a batch of %d failed", len(batch.rows))
            for row in batch.unfinished():
                row.answer.fail("the model failed; the server's log says why")
        with self.changed:
            self.running = []
            self.waiting.extend(batch.unfinished())  # behind those that wait, so that every model has its turn
            self._count()

    def _next(self) -> Batch | None:
        """The next batch; None when the engine closes."""
        with self.changed:
            if self._drop_cancelled():
                wanted = min(ROWS, len(self.waiting) + self.answered)
                self.changed.wait_for(lambda: self.closing or len(self.waiting) >= wanted, timeout=self.pause)
            while not self._drop_cancelled() and not self.closing:
                self.changed.wait()
                self.changed.wait_for(lambda: self.closing, timeout=GATHER)
            if self.closing:
                return None
            self.running = self._gather()
            self.waiting = deque(row for row in self.waiting if row not in self.running)
            self._count()
            self.metrics.batch_rows.observe(len(self.running))
            return Batch(self.running[0].request.model, self.running, lambda: bool(self.waiting), self._joiners)

    def _joiners(self, rows: Sequence[Row]) -> int:
        """How many of those that wait would find room beside these rows, where it is worth asking."""
        if not rows or not self.rows_are_free:
            return 0
        with self.changed:
            return len(self._fill(list(rows), rows[0].request.model)) - len(rows)

    def _gather(self) -> list[Row]:
        """Rows of the model that has waited longest, in their order, as many as fit."""
        return self._fill([], self.waiting[0].request.model)

    def _fill(self, rows: list[Row], model: str) -> list[Row]:
        """These rows and those of the model that wait, as many as fit."""
        for row in self.waiting:
            if row.request.model != model:
                continue
            if rows and (len(rows) == ROWS or _tokens([*rows, row]) > self.room):
                break
            rows.append(row)
        return rows

    def _drop_cancelled(self) -> int:
        """How many wait, without those for whom nobody waits any more."""
        for row in [row for row in self.waiting if row.answer.cancelled]:
            self.waiting.remove(row)
            row.answer.end("cancelled")
            self._count()
        return len(self.waiting)

    def _count(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.running.set(len(self.running))


def _tokens(rows: Sequence[Row]) -> int:
    """The places in a padded batch's cache, once every answer is as long as it may be."""
    return len(rows) * max(len(row.request.prompt) + row.request.max_tokens for row in rows)
