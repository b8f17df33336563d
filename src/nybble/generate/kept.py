"""The generator of one model, kept between answers: making one costs seconds on a GPU, and its cache remembers conversations."""

from __future__ import annotations

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

    def get(self, requests: Sequence[Request]) -> Generator:
        """A generator that can answer these requests: the decoder, or where that cannot compute the model, padded batches."""
        facts = list(_facts(self._model))
        needed = max((len(request.prompt) + request.max_tokens for request in requests), default=1)
        if facts != self._facts or (self._decoder is not None and needed > self._decoder.steps.tokens):
            self._decoder = None  # its memory is free before another takes some
            self._decoder, self._facts = self._make(requests), facts
        return self._decoder or Padded(self._model, self._pad_id, rows=max(1, len(requests)))

    def _make(self, requests: Sequence[Request]) -> RowDecoder | None:
        needed = sum(len(request.prompt) + request.max_tokens for request in requests)
        try:
            decoder = make_decoder(self._model, tokens=max(needed, self._least_tokens), cache=self._cache)
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
