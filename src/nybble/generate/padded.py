"""The default generator: the Transformers text-generation pipeline in padded batches, on any device."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.generate.adapters import can_mix
from nybble.generate.batching import ActiveRequest, GenerationBatch, Scheduler, activate
from nybble.generate.cache import cache_tokens
from nybble.generate.constraint import Constrain
from nybble.generate.pipeline import TokenPipeline
from nybble.generate.prompt_scores import score_tokens
from nybble.generate.request import (
    GenerationError,
    Handle,
    NonFiniteLogitsError,
    NullObserver,
    Observer,
    Request,
    Sink,
    Token,
    check_request,
)
from nybble.generate.sampling import BatchSampler, TokenDelivery

log = logging.getLogger("nybble.generate")
log.addHandler(logging.NullHandler())  # outside a server the error itself says why; a server adds its own handlers
ROWS = 32  # in a batch; 4-bit weights are read once for all of them
PATIENCE = 16  # tokens after which a batch gives way to waiting requests
GATHER = 0.01  # seconds that an idle generator waits for requests that arrive together
# At most so many seconds, or the time of one token, does a busy generator wait for clients that were just answered to ask again.
# Without it 16 clients fall into two groups that take turns in batches of 8 (SmolLM2 on two cores: a mean of 7.8 rows).
RETURN = 0.3


class Padded:
    """A generator for a base and its adapters; one `step` computes one batch.

    Args:
        model: in eval mode; adapters have PEFT's names. `step` turns gradients off, and the caller may do more
            (torch.inference_mode, autocast).
        pad_id: any token of the vocabulary; nothing attends to it.
        rows: the most rows of a batch.
        queue: how many requests may wait; None for any number.
        patience: as in `Scheduler`; with it, free memory also limits a batch. Without it only `rows` does, and batches run to
            their end, so that the same requests always make the same batches, and the same rounding; a batch that runs out of
            memory is halved.
        constrain: makes the constraints of requests with a grammar; None where there are none.
        observer: is notified of the load.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        pad_id: int,
        *,
        rows: int = ROWS,
        queue: int | None = None,
        patience: int | None = None,
        constrain: Constrain | None = None,
        observer: Observer | None = None,
    ) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model, self.pad_id, self.constrain = model, pad_id, constrain
        self.adapters = frozenset(model.peft_config) if isinstance(model, PeftModel) else frozenset()
        self.vocabulary, self.positions = int(base.config.vocab_size), int(base.config.max_position_embeddings)
        self.pipeline = TokenPipeline(model, pad_id)
        self.scheduler = Scheduler(
            rows=rows, queue=queue, patience=patience,
            token_budget=None if patience is None else cache_tokens(base), mixes_adapters=can_mix(model),
            rows_are_free=base.device.type != "cpu", observer=observer or NullObserver(),
        )  # fmt: skip

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self.scheduler.waiting)

    def healthy(self) -> bool:
        """Whether it can answer requests."""
        return not self.scheduler.closed

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """How many requests the next step should have, and for how many seconds it is worth waiting for them."""
        if idle:
            return self.scheduler.rows, GATHER
        expected = min(self.scheduler.rows, self.waiting + self.scheduler.answered)
        return expected, min(RETURN, self.scheduler.seconds_per_token)

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these, or none; from any thread.

        Raises:
            BusyError, GenerationError: as `Generator.submit`.
        """
        for request in requests:
            check_request(request, self.vocabulary, self.adapters)
        rows = activate(requests, sinks, self.constrain)
        self.scheduler.submit(rows)
        return list[Handle](rows)

    def step(self) -> bool:
        """Compute a batch until it ends or gives way; False once no request waits."""
        completed = False
        try:
            batch = self.scheduler.next()
            if batch is not None:
                start = time.perf_counter()
                self.scheduler.observer.batch_started(len(batch.rows))
                self._run(batch)
                more = self.scheduler.finish(batch, time.perf_counter() - start)
            completed = True
        finally:
            if not completed:  # Ctrl-C, or a defect: no client is left waiting
                self.scheduler.fail_running(GenerationError("generation was stopped"))
        return batch is not None and more

    def close(self) -> None:
        """Cancel everything; from any thread."""
        self.scheduler.close()

    def _run(self, batch: GenerationBatch) -> None:
        """Compute one batch; if it fails, only its own requests fail."""
        try:
            self._compute(batch)
        except torch.OutOfMemoryError as error:
            if len(batch.rows) > 1:
                self.scheduler.halve_budget(batch)
                log.warning(
                    "out of memory with %d answers; a batch now has at most %d tokens",
                    len(batch.rows), self.scheduler.token_budget,
                )  # fmt: skip
            else:
                # Its traceback would keep what the forward pass had allocated.
                _fail(batch, "out of memory: the prompt is too long for this device", error.with_traceback(None))
        except (RuntimeError, ValueError, IndexError) as error:
            log.exception("a batch of %d failed", len(batch.rows))
            _fail(batch, "the model failed; the log says why", error)

    def _compute(self, batch: GenerationBatch) -> None:
        assert not self.model.training, "the model is in training mode, so dropout would change the answers"
        for row in batch.rows:
            self._begin(row)
        batch.rows = rows = batch.unfinished()
        if not rows:
            return
        sampler = BatchSampler(rows, self.pipeline.device)
        adapters = [row.request.adapter for row in rows]
        uniform = len(set(adapters)) == 1
        with self._using_adapter(adapters[0]) if uniform else contextlib.nullcontext():
            self.pipeline.generate(
                [row.sequence for row in rows], max(row.tokens_left for row in rows), sampler, TokenDelivery(batch, sampler),
                None if uniform else adapters,
            )  # fmt: skip

    def _begin(self, row: ActiveRequest) -> None:
        """Score a prompt that is asked for, in a pass of its own, and tell the sink."""
        request = row.request
        prompt: list[Token] = []
        if request.prompt_logprobs is not None and not row.begun:
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            with self._using_adapter(request.adapter), torch.no_grad():
                ids = torch.tensor([list(request.prompt)], device=self.pipeline.device)
                states = base.model(input_ids=ids, use_cache=False).last_hidden_state[0]
                scores = score_tokens(states, base.lm_head, request.prompt[1:], request.prompt_logprobs)
            if scores is None:
                row.fail(NonFiniteLogitsError())
                return
            prompt = [Token(request.prompt[0]), *scores]
        row.begin(0, prompt)

    @contextlib.contextmanager
    def _using_adapter(self, adapter: str | None) -> Iterator[None]:
        """Activate one adapter, or the base."""
        if not isinstance(self.model, PeftModel):
            yield
        elif adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != adapter:
                self.model.set_adapter(adapter, inference_mode=True)
            yield


def _fail(batch: GenerationBatch, what: str, cause: Exception) -> None:
    for row in batch.unfinished():
        error = GenerationError(what)
        error.__cause__ = cause
        row.fail(error)
