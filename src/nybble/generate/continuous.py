"""Transformers' own continuous batching of one model without adapters: requests join and leave at every token.

It uses a paged cache instead of padding. The manager computes in its own thread; `step` waits for its next results and passes
them on, so that sinks are called from the thread that calls `step`, as with any other generator.
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
    NullObserver,
    Observer,
    Request,
    Sink,
    Token,
    UnsupportedError,
    check_request,
)

log = logging.getLogger("nybble.generate")
SECONDS_PER_REQUEST = 1  # a guess: the manager does not say how long a waiting request takes
SLOTS = 32  # requests computed at once
TICK = 0.05  # seconds after which a step without a result checks for cancellations and deadlines
# Tokens in a block of the cache: the default in Transformers 5.17, where it is called block_size, and in 5.23, page_size.
BLOCK = 256


@dataclass(eq=False)
class ManagedRequest:
    """A request that was given to the manager, which is also its handle."""

    name: str
    request: Request
    sink: Sink
    seen: int = 0
    """How many tokens the sink has received."""
    cancelled: bool = False

    def cancel(self) -> None:
        """Stop as soon as possible; from any thread."""
        self.cancelled = True


class Continuous:
    """A generator for one model; its adapter, if it had one, is merged.

    Args:
        model: in eval mode.
        pad_id: any token of the vocabulary.
        queue: how many requests may wait, besides those that are running; None for any number.
        observer: is notified of the load; it hears of no batches, as there are none.
    """

    def __init__(
        self, model: PreTrainedModel, pad_id: int, *, queue: int | None = None, observer: Observer | None = None
    ) -> None:
        self.vocabulary, self.positions = int(model.config.vocab_size), int(model.config.max_position_embeddings)
        self.queue, self.observer = queue, observer or NullObserver()
        self.lock = threading.Lock()
        self.running: dict[str, ManagedRequest] = {}
        self.numbers = itertools.count()
        self.closed = False
        # A logits processor is made only for options that are not neutral, and only a processor takes a request's own value
        # (Transformers 5.23).
        sampling = GenerationConfig(
            do_sample=True, temperature=0.5, top_k=1, top_p=0.5, pad_token_id=pad_id, bos_token_id=None, eos_token_id=-1,
        )  # fmt: skip
        config = ContinuousBatchingConfig(per_request_processors=True, max_requests_per_batch=SLOTS)
        if model.device.type == "cpu":  # by default it takes nine tenths of the machine's memory
            config.num_blocks = -(-min(SLOTS * self.positions, cache_tokens(model)) // BLOCK)
            config.max_batch_tokens = max(SLOTS, self.positions)
        with torch.inference_mode():
            self.manager = model.init_continuous_batching(sampling, config)
            self.manager.start()

    @property
    def waiting(self) -> int:
        """How many requests have no complete answer yet."""
        return len(self.running)

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return not self.closed and bool(self.manager.is_running())

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """No requests: one can join at any token."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Give all of these to the manager, or none; from any thread.

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
                raise BusyError(max(1, waiting * SECONDS_PER_REQUEST))
            new = [
                ManagedRequest(f"answer-{next(self.numbers)}", request, sink)
                for request, sink in zip(requests, sinks, strict=True)
            ]
            self.running |= {running.name: running for running in new}
            self._report()
        for running in new:
            self._start(running)
        return list[Handle](new)

    def step(self) -> bool:
        """Wait briefly for the manager's next results, and pass them on; False once no request is running."""
        self._end_unwanted()
        output = self.manager.get_result(timeout=TICK) if self.running else None
        while output is not None:
            self._receive(output)
            output = self.manager.get_result(timeout=0)
        if self.running and not self.closed and not self.manager.is_running():
            self._fail_all("the engine failed; the log says why")
        return bool(self.running)

    def close(self) -> None:
        """Stop the manager at once and cancel running requests; from any thread."""
        with self.lock:
            first, self.closed = not self.closed, True
        if first:
            self.manager.stop(block=True, hard_stop=True)
        for running in list(self.running.values()):
            self._end(running, "cancelled")

    def _start(self, running: ManagedRequest) -> None:
        request = running.request
        greedy = request.temperature == 0
        top_k = min(request.top_k or self.vocabulary, self.vocabulary)  # the manager stores it in 32 bits
        sampling: dict[str, Any] = {
            "temperature": 1.0 if greedy else float(request.temperature),
            "top_k": 1 if greedy else top_k,
            "top_p": float(request.top_p),
        }
        self.manager.add_request(
            list(request.prompt), running.name, max_new_tokens=request.max_tokens, streaming=True,
            eos_token_id=sorted(request.stop_ids), **sampling,
        )  # fmt: skip

    def _receive(self, output: GenerationOutput) -> None:
        """Pass on the new tokens of one answer."""
        running = self.running.get(output.request_id)
        if running is None or running.cancelled or self.closed:
            return  # a late token, or the manager's error for a request that was stopped
        if not running.seen and output.generated_tokens:
            running.sink.begin(0, ())
        new, running.seen = output.generated_tokens[running.seen :], len(output.generated_tokens)
        for token_id in new:
            if running.name not in self.running:  # closed in the meantime
                return
            running.sink.put(Token(token_id))
        if output.error is not None:
            log.error("an answer failed: %s", output.error)
            self._fail(running, "the model failed; the log says why")
        elif output.is_finished():
            self._end(running, "stop" if new and new[-1] in running.request.stop_ids else "length")

    def _end_unwanted(self) -> None:
        """Stop requests that were cancelled or are past their deadline, also in the queue: their prompts are not computed."""
        for running in list(self.running.values()):
            deadline = running.request.deadline
            is_late = deadline is not None and time.monotonic() >= deadline
            if running.cancelled or is_late:
                self.manager.cancel_request(running.name)
                self._end(running, "cancelled" if running.cancelled else "deadline")

    def _end(self, running: ManagedRequest, finish: Finish) -> None:
        if self._remove(running):
            running.sink.end(finish)

    def _fail(self, running: ManagedRequest, why: str) -> None:
        if self._remove(running):
            running.sink.fail(GenerationError(why))

    def _fail_all(self, why: str) -> None:
        for running in list(self.running.values()):
            self._fail(running, why)

    def _remove(self, running: ManagedRequest) -> bool:
        """Remove a request. Returns whether it was still there, as its sink is notified of only one end."""
        with self.lock:
            was_running = self.running.pop(running.name, None) is not None
            self._report()
        return was_running

    def _report(self) -> None:
        self.observer.load_changed(min(SLOTS, len(self.running)), max(0, len(self.running) - SLOTS))


def _check_options(request: Request) -> None:
    """Refuse options that the manager does not have: it samples for all requests from one random generator.

    Raises:
        UnsupportedError: a seed, log probabilities, min_p, a penalty or a bias; or no token at all.
    """
    if request.max_tokens == 0:
        raise UnsupportedError("max_tokens", "continuous batching generates at least one token")
    if request.seed is not None:
        raise UnsupportedError("seed", "continuous batching cannot seed one request")
    if request.logprobs is not None:
        raise UnsupportedError("logprobs", "continuous batching gives no log probabilities")
    neutral = Request((), 0, None, frozenset())
    for option in (
        "grammar",
        "prompt_logprobs",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ):
        if getattr(request, option) != getattr(neutral, option):
            raise UnsupportedError(option, f"continuous batching has no {option}")
