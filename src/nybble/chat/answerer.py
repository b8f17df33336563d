"""Messages in, text out: a run with its tokenizer and its template, on top of `nybble.generate`.

The function that training calls makes a prompt's token ids; a rendered string is never tokenised again.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedTokenizerBase

from nybble.data.rows.formats import Conversation
from nybble.data.text.template import Template
from nybble.data.text.tokens import check_ids, encode_prompt
from nybble.errors import DataError, DeviceError, ModelError
from nybble.generate.kept import KeptGenerator
from nybble.generate.request import Completed, GenerationError, NonFiniteLogitsError, Request, Token, complete
from nybble.model.adapter.updates import Updates
from nybble.run.start import QuantizedBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass(frozen=True)
class Continuation:
    """What a model continued a prompt with.

    Attributes:
        ids: its token ids, without the one that ends it.
        text: the same as text, without white space around it.
        ended: whether the model ended it; false if it reached `max_new_tokens`.
    """

    ids: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class Answerer:
    """A base model with the adapter of a run, its tokenizer and its template."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    fingerprint: str
    """Of the base's weights."""
    folder: pathlib.Path
    """Of the base."""
    updates: Updates
    """What the run's adapter changes."""
    adapter: str = "default"
    """PEFT's name of the run's adapter: several runs of one base share `model`."""
    system: str = ""
    """The system message of most training rows, to be the first message of a conversation."""
    bits: QuantizedBase | None = None
    """Those of the base, if nybble quantised it."""
    cache: pathlib.Path | None = None
    """The cache folder; None for the user's own."""

    def answer(
        self, conversations: Sequence[Conversation], sampling: Sampling = GREEDY, *, base: bool = False
    ) -> list[str]:
        """The assistant's next message in each conversation.

        Args:
            conversations: each ends with a user's message.
            sampling: see `complete`.
            base: the base answers, without the adapter.

        Raises:
            DataError: the template cannot express a conversation.
            NybbleError: as `complete`.
        """
        prompts = [encode_prompt(self.template, conversation) for conversation in conversations]
        return [continuation.text for continuation in self.complete(prompts, sampling, base=base)]

    def complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling = GREEDY,
        *,
        base: bool = False,
        on_token: Callable[[int, Token], None] | None = None,
    ) -> list[Continuation]:
        """What follows each prompt; all in one batch, as far as the memory allows.

        Args:
            prompts: token ids.
            sampling: with a seed, each prompt has its own: that seed for the first, and the following numbers for the others.
            base: the base answers, without the adapter.
            on_token: called for each token as it is generated, with the number of its prompt.

        Raises:
            DataError: a token id without an embedding, or a prompt that leaves no room for an answer.
            ModelError: the model's logits are infinite or NaN.
            DeviceError: one answer does not fit into memory.
        """
        positions = context_length(self.model)
        for prompt in prompts:
            check_ids(prompt, self.model.config.vocab_size, self.tokenizer)
            if len(prompt) >= positions:
                raise DataError(
                    f"a prompt of {len(prompt):,} tokens leaves no room for an answer: the context length of the model is "
                    f"{positions:,}",
                    fix="a shorter prompt",
                )
        adapter = None if base or self._is_base() else self.adapter
        requests = [self._request(prompt, number, sampling, adapter) for number, prompt in enumerate(prompts)]
        with explained_failures(), torch.inference_mode(), self._generator.using(requests) as generator:
            return [self._continuation(completed) for completed in complete(generator, requests, on_token)]

    @functools.cached_property
    def _generator(self) -> KeptGenerator:
        return KeptGenerator(self.model, self.tokenizer.pad_token_id, self.cache)

    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.template.ends

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Turn the adapter off inside the block: whoever runs `model` runs the base."""
        with self.model.disable_adapter():
            yield

    def as_tuned(self, tuned: bool) -> AbstractContextManager[None]:
        """Make `model` the tuned model or the base inside the block, for whoever runs it."""
        if not tuned:
            return self.as_base()
        if self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter, inference_mode=True)
        return contextlib.nullcontext()

    def _is_base(self) -> bool:
        """Whether the adapter is off, as inside `as_base`."""
        layers = (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return any(layer.disable_adapters for layer in layers)

    def _request(self, prompt: Sequence[int], number: int, sampling: Sampling, adapter: str | None) -> Request:
        seed = None if sampling.seed is None else (sampling.seed + number) % 2**64
        limit = min(sampling.max_new_tokens, context_length(self.model) - len(prompt))
        return Request(prompt, limit, adapter, self.stop_ids(), sampling.temperature, sampling.top_p, seed=seed)

    def _continuation(self, completed: Completed) -> Continuation:
        ended = completed.finish == "stop"
        ids = completed.ids[:-1] if ended else completed.ids
        text = self.tokenizer.decode(completed.ids, skip_special_tokens=True).strip()
        return Continuation(ids, text, ended)


def context_length(model: PeftModel) -> int:
    """The most tokens of prompt and answer together."""
    return int(model.get_base_model().config.max_position_embeddings)


@contextlib.contextmanager
def explained_failures() -> Iterator[None]:
    """Turn a generator's failures into errors with a fix; a defect passes unchanged."""
    try:
        yield
    except NonFiniteLogitsError as error:
        raise ModelError(str(error), fix="train with model.dtype=bfloat16; or answer on a CPU, --device cpu") from error
    except GenerationError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise DeviceError(
                "the device does not have enough memory for this answer", fix="a shorter prompt, or --device cpu"
            ) from error
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise
