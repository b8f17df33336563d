"""Transformers' own continuous batching, on one merged run: requests join and leave at every token.

It knows no adapters, so the run has to be merged first (`nybble export RUN --to merged`). A paged cache takes the place
of padding.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from nybble.chat.answerer import load_template
from nybble.errors import ServeError
from nybble.files.places import default_cache
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.model.device import choose_device, choose_dtype
from nybble.recipe import ModelOptions
from nybble.run.folder import Run
from nybble.serve.mailbox import Answer, BusyError, GenerationError, Mailbox, Model, Request, Token
from nybble.serve.metrics import Metrics
from nybble.generate.padded import cache_tokens

log = logging.getLogger("nybble.serve")
SECONDS_A_REQUEST = 1  # the manager tells nobody how long its queue is in seconds
SLOTS = 32  # answers under way at once
BLOCK = (
    256  # tokens in a block of the cache: the default of 5.17, where it is called block_size, and of 5.23, page_size
)


class ContinuousEngine:
    """One merged model under one name.

    Args:
        model: the merged model.
        queue: answers that may wait beside those under way.
    """

    name = "continuous"

    def __init__(self, model: PreTrainedModel, served: Model, metrics: Metrics, *, queue: int) -> None:
        self.models = {served.name: served}
        self.about = "Transformers' continuous batching on the merged run; each request joins the running batch"
        self.adapters: dict[str, str] = {}  # they are in the weights
        self.ends = list(dict.fromkeys([served.template.end_id, served.template.tokenizer.eos_token_id]))
        self.metrics, self.queue = metrics, queue
        self.lock = threading.Lock()
        self.under_way: dict[str, Answer] = {}
        self.numbers = itertools.count()
        # A processor is made only for what is not neutral, and only a processor takes a request's own value (transformers 5.23).
        sampling = GenerationConfig(
            do_sample=True, temperature=0.5, top_k=1, top_p=0.5, eos_token_id=self.ends,
            pad_token_id=served.template.tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        self.vocabulary = model.config.vocab_size
        own = ContinuousBatchingConfig(per_request_processors=True, max_requests_per_batch=SLOTS)
        if model.device.type == "cpu":  # it would take nine tenths of the machine's memory
            own.num_blocks = -(-min(SLOTS * served.positions, cache_tokens(model)) // BLOCK)
            own.max_batch_tokens = max(SLOTS, served.positions)
        self.manager = model.init_continuous_batching(sampling, own)
        self.manager.start()

    def refuses(self, request: Request) -> tuple[str, str] | None:
        """Seeds and log probabilities: the manager draws for all requests from one generator, after its filters."""
        if request.seed is not None:
            return "seed", "the engine continuous cannot seed one request; --engine pipeline can"
        if request.logprobs is not None:
            return "logprobs", "the engine continuous gives no log probabilities; --engine pipeline does"
        return None

    def submit(self, requests: Sequence[Request], mailbox: Mailbox) -> list[Answer]:
        """Hand requests to the manager, all or none."""
        if not self.healthy():
            raise GenerationError("the engine failed; the server's log says why")
        with self.lock:
            waiting = len(self.under_way) - SLOTS
            if waiting + len(requests) > self.queue:
                raise BusyError(max(1, waiting * SECONDS_A_REQUEST))
            named = [(f"answer-{next(self.numbers)}", request, Answer(mailbox)) for request in requests]
            self.under_way |= {name: answer for name, _, answer in named}
            self._count()
        for name, request, answer in named:
            self._hand_over(name, request, answer)
        return [answer for _, _, answer in named]

    def healthy(self) -> bool:
        """Whether the manager's thread works."""
        return bool(self.manager.is_running())

    def close(self) -> None:
        """Stop at once; what was under way fails."""
        with self.lock:
            left = list(self.under_way.values())
        self.manager.stop(block=True, hard_stop=True)
        for answer in left:
            if answer.finish is None:
                answer.fail("the server is shutting down")

    def _hand_over(self, name: str, request: Request, answer: Answer) -> None:
        """Register for a request's tokens, then send it."""
        seen = 0

        def receive(output: GenerationOutput) -> None:  # in the event loop
            nonlocal seen
            if answer.cancelled:
                return  # a token that was under way
            new, seen = output.generated_tokens[seen:], len(output.generated_tokens)
            for token_id in new:
                answer.put(Token(token_id))
            if output.error is not None:
                log.error("an answer failed: %s", output.error)
                answer.fail("the model failed; the server's log says why")
                self._forget(name, answer, None)
            elif output.is_finished():
                ended = bool(new) and new[-1] in self.ends
                self._forget(name, answer, "stop" if ended else "length")

        answer.when_cancelled = functools.partial(self._cancel, name, answer)
        self.manager.register_result_handler(name, receive)
        greedy = request.temperature == 0
        most = min(request.top_k or self.vocabulary, self.vocabulary)  # the manager keeps it in 32 bits
        own: dict[str, Any] = {
            "temperature": 1.0 if greedy else float(request.temperature),
            "top_k": 1 if greedy else most,
            "top_p": float(request.top_p),
        }
        self.manager.add_request(
            request.prompt, name, max_new_tokens=request.max_tokens, streaming=True, eos_token_id=self.ends, **own
        )

    def _cancel(self, name: str, answer: Answer) -> None:
        if name in self.under_way:  # also one that waits: its prompt is not computed for nobody
            self.manager.cancel_request(name)
            self._forget(name, answer, "cancelled")

    def _forget(self, name: str, answer: Answer, finish: Any) -> None:
        with self.lock:
            if self.under_way.pop(name, None) is not None and finish is not None:
                answer.end(finish)
            self._count()

    def _count(self) -> None:
        self.metrics.running.set(min(SLOTS, len(self.under_way)))
        self.metrics.waiting.set(max(0, len(self.under_way) - SLOTS))


def merged_folder(run: Run, engine: str) -> pathlib.Path:
    """Where the merged model of a run stands.

    Raises:
        ServeError: the run was not merged yet.
    """
    folder = run.folder / "export" / "merged"
    if not (folder / "config.json").exists():
        raise ServeError(
            f"the engine {engine} takes a merged model, and {run.folder} has none",
            where=str(folder),
            fix=f"nybble export {run.folder} --to merged",
        )
    return folder


def load_continuous(
    runs: Sequence[Run], metrics: Metrics, *, device: str, queue: int, cache: pathlib.Path | None = None
) -> ContinuousEngine:
    """Load a merged run.

    Raises:
        ServeError: several runs, or one that was not merged.
    """
    if len(runs) > 1:
        raise ServeError(
            "the engine continuous serves one merged run; several adapters on one base need the engine pipeline",
            fix=f"nybble serve {runs[0].folder} --engine continuous, or several runs with --engine pipeline",
        )
    run = runs[0]
    folder = merged_folder(run, "continuous")
    place = choose_device(device if device != "auto" else run.recipe.model.device)
    dtype, _ = choose_dtype(run.recipe.model.dtype, place)
    base = load_base(
        find_checkpoint(str(folder)), ModelOptions(quantization="none"), dtype, place, cache or default_cache()
    )
    model = base.model.eval()
    _, template = load_template(run, folder)
    name = run.folder.resolve().name
    served = Model(name, template, model.config.max_position_embeddings, None, model.config.vocab_size, run.system)
    with torch.inference_mode():
        return ContinuousEngine(model, served, metrics, queue=queue)
