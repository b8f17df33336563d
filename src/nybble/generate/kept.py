"""The generator of one model, kept between answers: its cache remembers conversations, and making one takes 0.2 s on a GPU (5 s
where kernels are still to be compiled)."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from nybble.generate.decoder.choice import make_decoder
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.padded import Padded
from nybble.generate.request import Generator, Request
from nybble.weights.watched import Ineligible

log = logging.getLogger("nybble.generate")
LEAST_TOKENS = 4096  # a conversation grows to this length without a new decoder: 2 GB on Llama 2 7B
Fact = tuple[object, ...]


class KeptGenerator:
    """Makes a generator for requests, or gives the one that it has.

    Args:
        model: in eval mode whenever a generator is asked for.
        pad_id: any token of the vocabulary.
        cache: the cache folder, where compiled kernels are kept; None for the user's own.
        least_tokens: of the decoder's cache, where memory allows, even if the requests need fewer.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        pad_id: int,
        cache: pathlib.Path | None = None,
        *,
        least_tokens: int = LEAST_TOKENS,
    ) -> None:
        self._model, self._pad_id, self._cache, self._least_tokens = model, pad_id, cache, least_tokens
        self._decoder: RowDecoder | None = None
        self._facts: list[Fact] = []
        self._refused = 0
        """The longest request, in tokens, when there was no decoder for it."""

    @contextlib.contextmanager
    def using(self, requests: Sequence[Request]) -> Iterator[Generator]:
        """A generator that can answer these requests: the decoder, or where that cannot compute them, padded batches.

        A decoder whose cache is larger than what is kept is freed afterwards: whoever evaluates needs the memory.
        """
        try:
            yield self._get(requests)
        finally:
            if self._decoder is not None and self._decoder.steps.tokens > self._least_tokens:
                self._decoder, self._facts = None, []

    def _get(self, requests: Sequence[Request]) -> Generator:
        facts = list(_facts(self._model))
        needs = [len(request.prompt) + request.max_tokens for request in requests]
        longest = max(needs, default=1)
        known = self._refused <= longest if self._decoder is None else longest <= self._decoder.steps.tokens
        if facts != self._facts or not known:
            self._decoder = None  # its memory is free before another takes some
            self._decoder, self._facts = self._make(sum(needs), longest), facts
            self._refused = longest if self._decoder is None else 0
        return self._decoder or Padded(self._model, self._pad_id, rows=max(1, len(requests)))

    def _make(self, tokens: int, longest: int) -> RowDecoder | None:
        tokens = max(tokens, self._least_tokens)
        try:
            decoder = make_decoder(self._model, tokens=tokens, longest=longest, cache=self._cache)
        except Ineligible as why:
            log.info("answering in padded batches: %s", why)
            return None
        log.info("answering by the decoder: %s", decoder.steps.about)
        return decoder


def _facts(model: torch.nn.Module) -> Iterator[Fact]:
    """What changes when parameters are replaced, moved, written to or merged.

    Torch does not see what is written past it: to `parameter.data`, or by bitsandbytes' optimisers.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            yield tuple(module.merged_adapters)
    with torch._C.DisableTorchFunctionSubclass():
        for parameter in model.parameters():
            version = 0 if parameter.is_inference() else parameter._version
            yield id(parameter), parameter.data_ptr(), version
