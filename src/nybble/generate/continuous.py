"""Transformers' own continuous batching of one model without adapters: requests join and leave at every token.

A paged cache takes the place of padding. The manager computes in a thread of its own; `step` waits for its next results and
hands them on, so that sinks are called from the thread that calls `step`, as with any other generator.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from nybble.generate.cache import cache_tokens
from nybble.generate.request import (
    BusyError,
    Finish,
    GenerationError,
    Handle,
    Observer,
    Request,
    Sink,
    Token,
    Unobserved,
    UnsupportedError,
    check_request,
)

log = logging.getLogger("nybble.generate")
SECONDS_A_REQUEST = 1  # the manager tells nobody how long its queue is in seconds
SLOTS = 32  # answers under way at once
TICK = 0.05  # seconds after which a step without a result looks for what was cancelled or is past its deadline
# Tokens in a block of the cache: the default of 5.17, where it is called block_size, and of 5.23, page_size.
BLOCK = 256


@dataclass(eq=False)
class ManagedRequest:
    """A request that the manager has, and the handle to it."""

    name: str
    request: Request
    sink: Sink
    seen: int = 0
    """Tokens that were handed on."""
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop as soon as possible; from any thread."""
        self.cancelled = True


class Continuous:
    """One model; its adapter, if it had one, is merged.

    Args:
        model: in eval mode.
        pad_id: any token of the vocabulary.
        queue: requests that may wait beside those under way; None for any number.
        observer: of how busy it is; there are no batches to tell of.
    """

    def __init__(
        self, model: PreTrainedModel, pad_id: int, *, queue: int | None = None, observer: Observer | None = None
    ) -> None:
        self.vocabulary, self.positions = int(model.config.vocab_size), int(model.config.max_position_embeddings)
        self.queue, self.observer = queue, observer or Unobserved()
        self.lock = threading.Lock()
        self.running: dict[str, ManagedRequest] = {}
        self.numbers = itertools.count()
        self.closed = False
        # A processor is made only for what is not neutral, and only a processor takes a request's own value (transformers 5.23).
        sampling = GenerationConfig(
            do_sample=True, temperature=0.5, top_k=1, top_p=0.5, pad_token_id=pad_id, bos_token_id=None, eos_token_id=-1,
        )  # fmt: skip
        own = ContinuousBatchingConfig(per_request_processors=True, max_requests_per_batch=SLOTS)
        if model.device.type == "cpu":  # it would take nine tenths of the machine's memory
            own.num_blocks = -(-min(SLOTS * self.positions, cache_tokens(model)) // BLOCK)
            own.max_batch_tokens = max(SLOTS, self.positions)
        with torch.inference_mode():
            self.manager = model.init_continuous_batching(sampling, own)
            self.manager.start()

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self.running)

    def healthy(self) -> bool:
        """Whether answers can be made."""
        return not self.closed and bool(self.manager.is_running())

    def companions(self, *, idle: bool) -> tuple[int, float]:
        """None: a request joins at any token."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Hand all of these to the manager, or none; from any thread.

        Raises:
            BusyError, UnsupportedError, GenerationError: as `Generator.submit`.
        """
        for request in requests:
            _check_options(request)
            check_request(request, self.vocabulary, ())
        with self.lock:
            if self.closed or not self.manager.is_running():
                raise GenerationError("the generator was closed" if self.closed else "the engine failed")
            waiting = len(self.running) - SLOTS
            if self.queue is not None and waiting + len(requests) > self.queue:
                raise BusyError(max(1, waiting * SECONDS_A_REQUEST))
            new = [
                ManagedRequest(f"answer-{next(self.numbers)}", request, sink)
                for request, sink in zip(requests, sinks, strict=True)
            ]
            self.running |= {running.name: running for running in new}
            self._report()
        for running in new:
            self._hand_over(running)
        return list[Handle](new)

    def step(self) -> bool:
        """Wait for the manager's next results, no longer than a moment, and hand them on; False once nothing is under way."""
        self._end_unwanted()
        output = self.manager.get_result(timeout=TICK) if self.running else None
        while output is not None:
            self._receive(output)
            output = self.manager.get_result(timeout=0)
        if self.running and not self.closed and not self.manager.is_running():
            self._fail_all("the engine failed; the log says why")
        return bool(self.running)

    def close(self) -> None:
        """Stop the manager at once and cancel what is under way; from any thread."""
        with self.lock:
            first, self.closed = not self.closed, True
        if first:
            self.manager.stop(block=True, hard_stop=True)
        for running in list(self.running.values()):
            self._end(running, "cancelled")

    def _hand_over(self, running: ManagedRequest) -> None:
        request = running.request
        greedy = request.temperature == 0
        most = min(request.top_k or self.vocabulary, self.vocabulary)  # the manager keeps it in 32 bits
        own: dict[str, Any] = {
            "temperature": 1.0 if greedy else float(request.temperature),
            "top_k": 1 if greedy else most,
            "top_p": float(request.top_p),
        }
        self.manager.add_request(
            list(request.prompt), running.name, max_new_tokens=request.max_tokens, streaming=True,
            eos_token_id=sorted(request.stop_ids), **own,
        )  # fmt: skip

    def _receive(self, output: GenerationOutput) -> None:
        """Hand on what is new of one answer."""
        running = self.running.get(output.request_id)
        if running is None or running.cancelled or self.closed:
            return  # a token that was under way, or the manager's error for what was stopped
        new, running.seen = output.generated_tokens[running.seen :], len(output.generated_tokens)
        for token_id in new:
            if running.name not in self.running:  # closed meanwhile
                return
            running.sink.put(Token(token_id))
        if output.error is not None:
            log.error("an answer failed: %s", output.error)
            self._fail(running, "the model failed; the log says why")
        elif output.is_finished():
            self._end(running, "stop" if new and new[-1] in running.request.stop_ids else "length")

    def _end_unwanted(self) -> None:
        """Stop what nobody waits for any more; also one in the queue: its prompt is not computed for nobody."""
        for running in list(self.running.values()):
            deadline = running.request.deadline
            late = deadline is not None and time.monotonic() >= deadline
            if running.cancelled or late:
                self.manager.cancel_request(running.name)
                self._end(running, "cancelled" if running.cancelled else "deadline")

    def _end(self, running: ManagedRequest, finish: Finish) -> None:
        if self._forget(running):
            running.sink.end(finish)

    def _fail(self, running: ManagedRequest, why: str) -> None:
        if self._forget(running):
            running.sink.fail(GenerationError(why))

    def _fail_all(self, why: str) -> None:
        for running in list(self.running.values()):
            self._fail(running, why)

    def _forget(self, running: ManagedRequest) -> bool:
        """Whether it was there still: its sink is told of one end only."""
        with self.lock:
            there = self.running.pop(running.name, None) is not None
            self._report()
        return there

    def _report(self) -> None:
        self.observer.load_changed(min(SLOTS, len(self.running)), max(0, len(self.running) - SLOTS))


def _check_options(request: Request) -> None:
    """The manager draws for all requests from one generator, after its filters.

    Raises:
        UnsupportedError: for a seed, and for log probabilities.
    """
    if request.seed is not None:
        raise UnsupportedError("seed", "continuous batching cannot seed one request")
    if request.logprobs is not None:
        raise UnsupportedError("logprobs", "continuous batching gives no log probabilities")
