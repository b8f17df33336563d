"""A run that answers, through the Transformers text-generation pipeline.

The pipeline's own preprocess would tokenise a rendered string; it is passed over: prompts come as the token ids of the function
that training calls.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase, TextGenerationPipeline
from transformers.generation.streamers import BaseStreamer

from nybble.data.formats import Conversation
from nybble.data.template import Template, choose_template, read_template
from nybble.data.tokens import encode_prompt
from nybble.model.adapter import load_adapter
from nybble.model.base import load_base
from nybble.model.checkpoint import find_checkpoint
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer import load_tokenizer
from nybble.run import CACHE, Run


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """What a model went on with."""

    text: str
    ended: bool
    """Whether it stopped by itself, and not at the longest answer allowed."""


@dataclass(frozen=True)
class Answerer:
    """A base model with the adapter of a run, its tokenizer and its template."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    fingerprint: str
    """Of the base's weights."""

    def answer(
        self, conversations: Sequence[Conversation], sampling: Sampling, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """The assistant's next message in each conversation; all in one batch."""
        prompts = [encode_prompt(self.template, conversation) for conversation in conversations]
        return [completion.text for completion in self.complete(prompts, sampling, streamer)]

    def complete(
        self, prompts: Sequence[list[int]], sampling: Sampling, streamer: BaseStreamer | None = None
    ) -> list[Completion]:
        """What follows each prompt, given as token ids; all in one batch."""
        pipeline = ConversationPipeline(self.model, self.tokenizer, self.template)
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        if streamer is not None:
            settings["streamer"] = streamer
        return pipeline.complete(prompts, settings)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """The base model's answers: the adapter is switched off meanwhile."""
        with self.model.disable_adapter():
            yield

    def as_tuned(self, tuned: bool) -> AbstractContextManager[None]:
        """The tuned model's answers, or the base's."""
        return contextlib.nullcontext() if tuned else self.as_base()


class ConversationPipeline(TextGenerationPipeline):  # type: ignore[misc]
    """Text generation from the token ids of prompts."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        super().__init__(model=model.get_base_model(), tokenizer=tokenizer)  # its layers carry the adapter
        self.template = template

    def complete(self, rows: Sequence[list[int]], settings: dict[str, Any]) -> list[Completion]:
        """Generate for all prompts in one padded batch; what they all begin with is computed once."""
        shared = _common_prefix(rows) if len(rows) > 1 else 0
        ids, mask = _pad_after(rows, shared, self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.device), mask.to(self.device)
        stops = {"eos_token_id": self._stops(), "pad_token_id": self.tokenizer.pad_token_id, "use_cache": True}
        with torch.inference_mode():
            cache = {"past_key_values": self._prefill(ids[:1, :shared], len(rows))} if shared else {}
            inputs = {"input_ids": ids, "attention_mask": mask, "prompt_text": ""}
            output = self._forward(inputs, **settings, **stops, **cache)["generated_sequence"].reshape(len(rows), -1)
        return [self._completion(row[ids.shape[1] :].tolist()) for row in output]

    def _completion(self, ids: list[int]) -> Completion:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Completion(text, ended=not set(self._stops()).isdisjoint(ids))

    def _prefill(self, prefix: torch.Tensor, rows: int) -> DynamicCache:
        """Keys and values of a prefix, (1, tokens), for so many rows."""
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
        return cache

    def _stops(self) -> list[int]:
        return list(dict.fromkeys([self.template.end_id, self.tokenizer.eos_token_id]))


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, one left over in each to go on from."""
    first, last = min(rows), max(rows)  # what these two share, all between them share
    limit = min(map(len, rows)) - 1
    return next((n for n in range(limit) if first[n] != last[n]), limit)


def _pad_after(rows: Sequence[list[int]], shared: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (rows, longest): the shared beginning, then padding, so that all rows end together."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[*row[:shared], *[pad_id] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[*[1] * shared, *[0] * gap, *[1] * (longest - shared - gap)] for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)


def load_answerer(run: Run, cache: pathlib.Path = CACHE, device: str = "auto") -> Answerer:
    """Load a run to answer with: base as in training, adapter, tokenizer and template of the run.

    Raises:
        ModelError: the base is gone or not the one the adapter fits; --base says where it is.
    """
    place = choose_device(device if device != "auto" else run.recipe.model.device)
    dtype, _ = choose_dtype(run.recipe.model.dtype, place)
    checkpoint = find_checkpoint(run.recipe.model.path, run.recipe.model.revision)
    base = load_base(checkpoint, run.recipe.model, dtype, place, cache)
    model = load_adapter(base.model, run.adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # stored in float32; training computed with it in this type
            parameter.data = parameter.data.to(dtype)
    model.eval()
    if run.is_bare_adapter:
        tokenizer = _bare_tokenizer(run.folder, checkpoint.folder)
        return Answerer(model, tokenizer, choose_template(tokenizer, "auto", "alpaca"), base.fingerprint)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    return Answerer(model, tokenizer, read_template(tokenizer, run.folder / "template.json"), base.fingerprint)


def _bare_tokenizer(adapter: pathlib.Path, base: pathlib.Path) -> PreTrainedTokenizerBase:
    """Somebody else's adapter may bring its tokenizer; else the base's serves."""
    return load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else base)
