"""The decoder: rows join and leave at every token, each with its own adapter, over a cache that remembers how sequences began."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from nybble.generate.batching import ActiveRequest, activate
from nybble.generate.constraint import Constrain
from nybble.generate.decoder.lookup import SPECULATING_ROWS, VERIFIED_TOKENS, PromptLookup
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.part_scores import PartScores
from nybble.generate.decoder.rows import DecodedRow, Unread, add_scores, fail, fail_unless_lost
from nybble.generate.decoder.steps import Steps
from nybble.generate.penalties import has_penalty
from nybble.generate.request import (
    BusyError,
    GenerationError,
    Handle,
    NullObserver,
    Observer,
    Request,
    Sink,
    Token,
    check_request,
)
from nybble.generate.sampling import RowSampler
from nybble.generate.transfers import to_device

log = logging.getLogger("nybble.generate")


class RowDecoder:
    """See `nybble.generate.request.Generator`; one `step` computes a part of the prompts and then a token for each row.

    Where the device computes on its own, the host is one step ahead: it hands over a step's tokens while the device computes the
    next step, which takes its input from the device. An answer that ends with a stop token has been computed one token too far by
    then; that token is dropped.

    Args:
        model: what `steps` computes.
        steps: the computation, and the cache.
        queue: requests that may wait; None for any number.
        constrain: makes the constraints of requests with a grammar; None where there are none.
        observer: is notified of the load.
    """

    def __init__(
        self, model: DecoderModel, steps: Steps, *, queue: int | None = None, constrain: Constrain | None = None,
        observer: Observer | None = None,
    ) -> None:  # fmt: skip
        self.vocabulary, self.positions = model.vocabulary, model.positions
        self.adapters = frozenset(model.adapters)
        self.steps, self.queue, self.observer = steps, queue, observer or NullObserver()
        self._device, self._constrain = model.device, constrain
        self._sampler = RowSampler(model.device)
        self._waiting: deque[ActiveRequest] = deque()
        self._rows: list[DecodedRow] = []
        self._entries = list(range(steps.rows))
        self._last = torch.zeros(steps.rows, dtype=torch.long, device=model.device)
        self._decoded: list[DecodedRow] = []
        self._unread: deque[Unread] = deque()
        self._refusal = ""
        """Why nothing is answered any more."""
        self._in_step = False
        self._lock = threading.Lock()
        self.speculates = True
        """Whether repeated passages are drafted (`lookup.py`)."""
        self._seconds_per_answer = 1.0

    @property
    def waiting(self) -> int:
        """How many requests a step could work on."""
        return len(self._waiting) + len(self._rows)

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return not self._refusal

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """No requests: one can join at any token."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; from any thread.

        Raises:
            BusyError, GenerationError: as `Generator.submit`; also for a request beyond the context length or the whole cache.
        """
        for request in requests:
            check_request(request, self.vocabulary, self.adapters)
            self._check_length(request)
        new = activate(requests, sinks, self._constrain)
        with self._lock:
            if self._refusal:
                raise GenerationError(self._refusal)
            if self.queue is not None and len(self._waiting) + len(new) > self.queue:
                raise BusyError(max(1, round(len(self._waiting) * self._seconds_per_answer)))
            self._waiting.extend(new)
        self._report()
        return list[Handle](new)

    def step(self) -> bool:
        """A token for each row; False once nothing is left to do."""
        began = time.perf_counter()
        completed = False
        with self._lock:
            self._in_step = True
        try:
            # Computed in the types of the weights, whatever the caller's.
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                self._admit()
                self._prefill()
                self._decode()
            completed = True
        except torch.AcceleratorError as error:
            completed = True
            self._lose_device(error)
        finally:
            if not completed:  # Ctrl-C, or a defect: no client is left waiting
                self._abandon("generation was stopped")
            self._remove_ended(time.perf_counter() - began)
            with self._lock:
                self._in_step = False
                if self._refusal:
                    self._end_cancelled()
        return bool(self.waiting)

    def close(self) -> None:
        """Cancel everything, from any thread; what a step is computing ends with it."""
        with self._lock:
            self._refusal = self._refusal or "the generator was closed"
            for active in [*self._waiting, *(row.active for row in self._rows)]:
                active.cancel()
            self._drop_unwanted()
            if not self._in_step:  # perhaps there will be no other step
                self._end_cancelled()

    def _check_length(self, request: Request) -> None:
        """Refuse a request that can never be completed.

        Raises:
            GenerationError: it is beyond the context length, or the whole cache.
        """
        needed = len(request.prompt) + request.max_tokens
        about = f"the request needs {needed:,} tokens (prompt {len(request.prompt):,}, answer up to {request.max_tokens:,}), and"
        if needed > self.positions:
            raise GenerationError(f"{about} the context length of the model is {self.positions:,}")
        if needed > self.steps.tokens:
            raise GenerationError(f"{about} there is memory for {self.steps.tokens:,}")

    def _admit(self) -> None:
        """Give waiting requests a slot, the oldest first; where the cache has no room yet, the others wait behind it."""
        with self._lock:
            self._drop_unwanted()
            while self._waiting and self._entries:
                active = self._waiting[0]
                request = active.request
                # What others have computed comes without logits.
                known = request.prompt if request.prompt_logprobs is None else ()
                slot = self.steps.reserve(known, request.adapter, len(request.prompt) + request.max_tokens)
                if slot is None:
                    break
                drafts = self.speculates and not has_penalty(request) and request.grammar is None
                lookup = PromptLookup(request.prompt) if drafts else None
                self._rows.append(DecodedRow(self._waiting.popleft(), slot, self._entries.pop(), slot.length, lookup))
        self._report()

    def _drop_unwanted(self) -> None:
        for active in self._waiting:
            active.end_if_unwanted()
        self._waiting = deque(active for active in self._waiting if not active.ended)

    def _prefill(self) -> None:
        """Compute some tokens of the prompts, the oldest first, in one pass; completed prompts get their first token."""
        budget = self.steps.chunk
        rows: list[DecodedRow] = []
        parts: list[Sequence[int]] = []
        for row in self._rows:
            row.active.end_if_unwanted()
            rest = row.rest_of_prompt
            if not row.active.ended and rest and budget > 0:
                rows.append(row)
                parts.append(rest[:budget])
                budget -= len(parts[-1])
        if rows:
            self._prefill_parts(rows, parts)

    def _prefill_parts(self, rows: Sequence[DecodedRow], parts: Sequence[Sequence[int]]) -> None:
        """One pass; if it runs out of memory, each prompt is tried alone, so that only those that do not fit fail."""
        requests = [row.active.request for row in rows]
        scores = PartScores(requests, [row.slot.length for row in rows], parts)
        visit = scores if any(request.prompt_logprobs is not None for request in requests) else None
        try:
            logits = self.steps.prefill([row.slot for row in rows], parts, visit)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                fail(rows, "out of memory: the prompt is too long for this device", error)
                return
            for row, part in zip(rows, parts, strict=True):
                self._prefill_parts([row], [part])
        except (RuntimeError, ValueError, IndexError) as error:
            fail_unless_lost(rows, error)
        else:
            add_scores(rows, scores)
            self._begin(rows, logits)

    def _begin(self, rows: Sequence[DecodedRow], logits: torch.Tensor) -> None:
        """Give the rows whose prompt is computed their first token."""
        done = [n for n, row in enumerate(rows) if not row.rest_of_prompt]
        for n in done:
            rows[n].active.begin(rows[n].cached, rows[n].prompt)
        wanted = [n for n in done if not rows[n].active.ended]
        if not wanted:
            return
        own = [rows[n] for n in wanted]
        try:
            self._sample(own, logits if len(wanted) == len(rows) else logits[wanted])
        except (RuntimeError, ValueError, IndexError) as error:
            fail_unless_lost(own, error)

    def _decode(self) -> None:
        """Start a step of all rows that have a token to come, then hand over the tokens of the step before."""
        rows = self._decodable()
        has_grammar = any(row.active.constraint is not None for row in rows)
        if has_grammar or (rows != self._decoded and any(has_penalty(row.active.request) for row in rows)):
            self._deliver()  # as the sampler then needs to know all tokens
            rows = self._decodable()
        if self._speculate(rows):
            return
        rows = self._decodable()
        if not rows:
            self._deliver()
            return
        if rows != self._decoded:
            self._decoded, self._table = rows, to_device([row.entry for row in rows], self._device)
        self.observer.batch_started(len(rows))
        try:
            self._sample(rows, self.steps.decode([row.slot for row in rows], self._last[self._table]))
        except (RuntimeError, ValueError, IndexError) as error:  # torch.OutOfMemoryError is a RuntimeError
            fail_unless_lost(rows, error)
        self._deliver(but=1 if self.steps.asynchronous else 0)

    def _speculate(self, rows: Sequence[DecodedRow]) -> bool:
        """Where few rows are decoded and one of them repeats itself, verify drafts instead of starting a step."""
        if len(rows) > SPECULATING_ROWS or not any(row.draft(1) for row in rows):
            return False
        self._deliver()  # a draft begins behind tokens that are known
        rows = self._decodable()
        most = VERIFIED_TOKENS // max(1, len(rows)) - 1
        drafts = [row.draft(most) for row in rows]
        if not any(drafts):
            return False
        self.observer.batch_started(len(rows))
        try:
            self._verify(rows, drafts)
        except (RuntimeError, ValueError, IndexError) as error:
            fail_unless_lost(rows, error)
        return True

    def _verify(self, rows: Sequence[DecodedRow], drafts: Sequence[list[int]]) -> None:
        parts = [[row.active.answer_ids[-1], *draft] for row, draft in zip(rows, drafts, strict=True)]
        logits = self.steps.verify([row.slot for row in rows], parts)
        spread = [row for row, part in zip(rows, parts, strict=True) for _ in part]
        positions = [row.slot.length + n + 1 for row, part in zip(rows, parts, strict=True) for n in range(len(part))]
        tokens = iter(self._sampler.sample([row.active for row in spread], positions, logits).read())
        for row, draft in zip(rows, drafts, strict=True):
            self._accept(row, draft, list(itertools.islice(tokens, len(draft) + 1)))
        entries = to_device([row.entry for row in rows], self._device)
        self._last[entries] = to_device([row.active.sequence[-1] for row in rows], self._device)

    def _accept(self, row: DecodedRow, draft: Sequence[int], tokens: Sequence[Token | None]) -> None:
        """Hand over what the model chose, up to the first token that was drafted otherwise."""
        accepted = next(
            (n for n, (guess, token) in enumerate(zip(draft, tokens, strict=False)) if not token or token.id != guess),
            len(draft),
        )
        for token in tokens[: accepted + 1]:
            if not row.active.ended:
                row.slot.length += 1
                row.receive(token)
        if row.lookup is not None and draft:
            row.lookup.learn(len(draft), accepted)

    def _decodable(self) -> list[DecodedRow]:
        return [row for row in self._rows if row.is_decoding]

    def _sample(self, rows: Sequence[DecodedRow], logits: torch.Tensor) -> None:
        positions = [row.slot.length for row in rows]
        sampled = self._sampler.sample([row.active for row in rows], positions, logits)
        entries = self._table if rows is self._decoded else to_device([row.entry for row in rows], self._device)
        self._last[entries] = sampled.ids
        self._unread.append(Unread(rows, sampled))

    def _deliver(self, but: int = 0) -> None:
        """Hand over computed tokens, except those of the latest steps."""
        while len(self._unread) > but:
            unread = self._unread.popleft()
            if all(row.active.ended for row in unread.rows):
                continue
            try:
                tokens = unread.sampled.read()
            except RuntimeError as error:
                fail_unless_lost(unread.rows, error)
                continue
            for row, token in zip(unread.rows, tokens, strict=True):
                row.receive(token)

    def _remove_ended(self, seconds: float) -> None:
        """Free the slots of rows that have ended."""
        ended = [row for row in self._rows if row.active.ended]
        for row in ended:
            self.steps.release(row.slot, row.active.sequence[: row.slot.length])
            self._entries.append(row.entry)
        if ended:
            with self._lock:
                self._rows = [row for row in self._rows if not row.active.ended]
            self._seconds_per_answer = 0.7 * self._seconds_per_answer + 0.3 * seconds * len(self._rows or ended)
            self._report()

    def _abandon(self, why: str) -> None:
        """Fail all rows."""
        self._unread.clear()
        for row in self._rows:
            if not row.active.ended:
                row.active.fail(GenerationError(why))

    def _lose_device(self, error: Exception) -> None:
        """The device cannot be used any more: fail everything, and refuse what comes."""
        why = "the device failed and answers nothing any more; restart nybble"
        log.error("%s: %s", why, str(error).splitlines()[0])
        with self._lock:
            self._refusal, waiting = why, self._waiting
            self._waiting = deque()
        for active in waiting:
            active.fail(GenerationError(why))
        self._abandon(why)

    def _end_cancelled(self) -> None:
        self._unread.clear()
        for row in self._rows:
            if not row.active.ended:
                row.active.end_if_unwanted()
        self._rows = []

    def _report(self) -> None:
        self.observer.load_changed(len(self._rows), len(self._waiting))
