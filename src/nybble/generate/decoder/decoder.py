"""The decoder: rows come and go at every token, each with its own adapter, over a cache that remembers beginnings."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.generate.batching import ActiveRequest
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.steps import CacheSlot, Steps
from nybble.generate.request import (
    BusyError,
    GenerationError,
    Handle,
    NullObserver,
    Observer,
    Request,
    Sink,
    check_request,
)
from nybble.generate.sampling import RowSampler
from nybble.generate.seeds import fresh_seed

log = logging.getLogger("nybble.generate")


@dataclass(eq=False)
class DecodedRow:
    """A request under way: what it asks for, and its place in the cache."""

    active: ActiveRequest
    slot: CacheSlot

    @property
    def to_compute(self) -> list[int]:
        """Its tokens that are not in the cache yet; one, once the prompt is computed."""
        return self.active.sequence[self.slot.length :]


class RowDecoder:
    """See `nybble.generate.request.Generator`; one `step` computes a part of the prompts and then a token for each row.

    Args:
        model: what `steps` computes.
        steps: where the rows are.
        queue: requests that may wait; None for any number.
        observer: of how busy it is.
    """

    def __init__(
        self, model: DecoderModel, steps: Steps, *, queue: int | None = None, observer: Observer | None = None
    ) -> None:
        self.vocabulary, self.positions = model.vocabulary, model.positions
        self.adapters = frozenset(model.adapters)
        self.steps, self.queue, self.observer = steps, queue, observer or NullObserver()
        self._sampler = RowSampler(model.device)
        self._waiting: deque[ActiveRequest] = deque()
        self._rows: list[DecodedRow] = []
        self._closed = self._in_step = False
        self._lock = threading.Lock()
        self._seconds_a_request = 1.0

    @property
    def waiting(self) -> int:
        """Requests that a step would bring on."""
        return len(self._waiting) + len(self._rows)

    def healthy(self) -> bool:
        """Whether answers can be made."""
        return not self._closed

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """None: a request joins at any token."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; from any thread.

        Raises:
            BusyError, GenerationError: as `Generator.submit`; also for a request beyond the context length or the whole cache.
        """
        for request in requests:
            check_request(request, self.vocabulary, self.adapters)
            asked = len(request.prompt) + request.max_tokens
            if asked > self.positions:
                raise GenerationError(
                    f"the request needs {asked:,} tokens (prompt {len(request.prompt):,}, answer up to "
                    f"{request.max_tokens:,}), and the context length of the model is {self.positions:,}"
                )
            if asked > self.steps.tokens:
                raise GenerationError(
                    f"the request needs {asked:,} tokens (prompt {len(request.prompt):,}, answer up to "
                    f"{request.max_tokens:,}), and there is memory for {self.steps.tokens:,}"
                )
        new = [
            ActiveRequest(request, sink, fresh_seed() if request.seed is None else request.seed)
            for request, sink in zip(requests, sinks, strict=True)
        ]
        with self._lock:
            if self._closed:
                raise GenerationError("the generator was closed")
            if self.queue is not None and len(self._waiting) + len(new) > self.queue:
                raise BusyError(max(1, round(len(self._waiting) * self._seconds_a_request)))
            self._waiting.extend(new)
        self._report()
        return list[Handle](new)

    def step(self) -> bool:
        """A token for each row; False once nothing is left to do."""
        began = time.perf_counter()
        whole = False
        with self._lock:
            self._in_step = True
        try:
            self._admit()
            self._prefill()
            self._decode()
            whole = True
        finally:
            if not whole:  # Ctrl-C, or a defect: nobody is left waiting
                for row in self._rows:
                    if not row.active.ended:
                        row.active.fail(GenerationError("generation was stopped"))
            self._leave(time.perf_counter() - began)
            with self._lock:
                self._in_step = False
                if self._closed:
                    self._end_cancelled()
        return bool(self.waiting)

    def close(self) -> None:
        """Cancel everything, from any thread; what a step computes just now ends with it."""
        with self._lock:
            self._closed = True
            for active in [*self._waiting, *(row.active for row in self._rows)]:
                active.cancel()
            self._drop_unwanted()
            if not self._in_step:  # perhaps none will come
                self._end_cancelled()

    def _end_cancelled(self) -> None:
        for row in self._rows:
            if not row.active.ended:
                row.active.end_if_unwanted()
        self._rows = []

    def _admit(self) -> None:
        """Give those that wait a place, the oldest first; where it has no room yet the others wait behind it."""
        with self._lock:
            self._drop_unwanted()
            while self._waiting and len(self._rows) < self.steps.rows:
                active = self._waiting[0]
                request = active.request
                slot = self.steps.reserve(request.prompt, request.adapter, len(request.prompt) + request.max_tokens)
                if slot is None:
                    break
                self._rows.append(DecodedRow(self._waiting.popleft(), slot))
        self._report()

    def _drop_unwanted(self) -> None:
        for active in self._waiting:
            active.end_if_unwanted()
        self._waiting = deque(active for active in self._waiting if not active.ended)

    def _prefill(self) -> None:
        """Some tokens of the prompts, the oldest first, in one pass; whose prompt is done gets its first token."""
        budget = self.steps.chunk
        rows: list[DecodedRow] = []
        parts: list[list[int]] = []
        for row in self._rows:
            row.active.end_if_unwanted()
            ids = row.to_compute
            if not row.active.ended and len(ids) > 1 and budget > 0:
                rows.append(row)
                parts.append(ids[:budget])
                budget -= len(parts[-1])
        if rows:
            self._prefill_parts(rows, parts)

    def _prefill_parts(self, rows: Sequence[DecodedRow], parts: Sequence[list[int]]) -> None:
        """One pass; where it runs out of memory each prompt is tried alone, so that one takes no other along."""
        try:
            logits = self.steps.prefill([row.slot for row in rows], parts)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                _fail(rows, "out of memory: the prompt is too long for this device", error)
                return
            for row, part in zip(rows, parts, strict=True):
                self._prefill_parts([row], [part])
        except (RuntimeError, ValueError, IndexError) as error:
            log.exception("a prompt failed")
            _fail(rows, "the model failed; the log says why", error)
        else:
            done = [n for n, row in enumerate(rows) if not row.to_compute]
            if done:
                self._hand_over([rows[n] for n in done], logits[done])

    def _decode(self) -> None:
        rows = [row for row in self._rows if not row.active.ended and len(row.to_compute) == 1]
        if not rows:
            return
        self.observer.batch_started(len(rows))
        try:
            logits = self.steps.decode([row.slot for row in rows], [row.to_compute[0] for row in rows])
        except (RuntimeError, ValueError, IndexError) as error:  # torch.OutOfMemoryError is one of the first
            log.exception("a step failed")
            _fail(rows, "the model failed; the log says why", error)
        else:
            self._hand_over(rows, logits)

    def _hand_over(self, rows: Sequence[DecodedRow], logits: torch.Tensor) -> None:
        actives = [row.active for row in rows]
        for active, token in zip(actives, self._sampler.next_tokens(actives, logits), strict=True):
            if not active.ended:
                active.add_token(token)

    def _leave(self, seconds: float) -> None:
        """Give back the places of rows that are over."""
        over = [row for row in self._rows if row.active.ended]
        for row in over:
            self.steps.release(row.slot, row.active.sequence[: row.slot.length])
        if over:
            with self._lock:
                self._rows = [row for row in self._rows if not row.active.ended]
            self._seconds_a_request = 0.7 * self._seconds_a_request + 0.3 * seconds * len(self._rows or over)
            self._report()

    def _report(self) -> None:
        self.observer.load_changed(len(self._rows), len(self._waiting))


def _fail(rows: Sequence[DecodedRow], what: str, cause: Exception) -> None:
    for row in rows:
        error = GenerationError(what)
        error.__cause__ = cause.with_traceback(None)  # which would hold what the forward had allocated
        row.active.fail(error)
