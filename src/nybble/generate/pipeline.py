"""The Transformers text-generation pipeline, from token ids to token ids.

The pipeline's own preprocess would tokenise a string, and its postprocess would make one: both are skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import (
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TextGenerationPipeline,
)

from nybble.engine.fusion import streams_weights

BASE = "__base__"  # PEFT's name, in a mixed batch, of rows without an adapter


class TokenPipeline(TextGenerationPipeline):  # type: ignore[misc]
    """Text generation without a tokenizer."""

    def __init__(self, model: PreTrainedModel | PeftModel, pad_id: int) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # Without a device the pipeline would move the model to the first GPU, unless Accelerate has placed it.
        device = None if getattr(base, "hf_device_map", None) is not None else base.device
        super().__init__(model=base, device=device)
        self.model = (
            model  # set afterwards: the pipeline does not accept PEFT's class, whose generate takes adapter names
        )
        self.pad_id = pad_id
        self.has_cache = not streams_weights(base)
        """Whether keys and values are kept from token to token. Without them each token computes its whole row again: the fused
        layers build no cache, and others cannot compute while the weights are on the host."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        sampler: LogitsProcessor,
        delivery: StoppingCriteria,
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        """Generate for all prompts in one padded batch, greedily. A common prefix of all prompts is computed once, or once for
        each adapter; without a cache nothing is shared.

        Args:
            prompts: token ids.
            max_tokens: the maximum length of the longest answer.
            sampler: gives the chosen token the largest score.
            delivery: receives the tokens, and says which rows are done.
            adapters: one per prompt, None for the base; without it, the active adapter answers all.
        """
        shared = common_prefix(prompts) if len(prompts) > 1 and self.has_cache else 0
        ids, mask = pad_after(prompts, shared, self.pad_id)
        names = None if adapters is None else [BASE if name is None else name for name in adapters]
        # `delivery` ends each row at its own stops. Without an eos_token_id generate would use the model's; no token has this id.
        options = {
            "do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": int(self.model.config.vocab_size),
            "pad_token_id": self.pad_id, "use_cache": self.has_cache,
            "logits_processor": [sampler], "stopping_criteria": [delivery],
        }  # fmt: skip
        with torch.no_grad():
            if shared:
                options["past_key_values"] = self._prefill(ids[:1, :shared].to(self.device), len(prompts), names)
            with _adapter_per_row(self.model, names):
                self.forward({"input_ids": ids, "attention_mask": mask, "prompt_text": ""}, **options)

    def _prefill(self, prefix: torch.Tensor, rows: int, names: list[str] | None) -> DynamicCache:
        """Keys and values of a prefix, (1, tokens), repeated for so many rows."""
        cache = DynamicCache(config=self.model.config)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if names is None:
            self.model(input_ids=prefix, **options)
            cache.batch_repeat_interleave(rows)
        else:
            distinct = list(dict.fromkeys(names))
            with _adapter_per_row(self.model, distinct):
                self.model(input_ids=prefix.expand(len(distinct), -1), **options)
            cache.batch_select_indices(torch.tensor([distinct.index(name) for name in names], device=self.device))
        return cache


@contextlib.contextmanager
def _adapter_per_row(model: PreTrainedModel | PeftModel, names: list[str] | None) -> Iterator[None]:
    """Compute each row with its own adapter; without names, all rows with the active one.

    PEFT 0.21 does the same for `adapter_names=`, but leaves its hooks behind if the model raises, so that later batches fail or
    are answered by another adapter.
    """

    def add_names(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"adapter_names": names}

    handles = []
    try:
        if names is not None:
            layers = (module for module in model.modules() if isinstance(module, LoraLayer))
            handles += [layer.register_forward_pre_hook(add_names, with_kwargs=True) for layer in layers]
        yield
    finally:
        for handle in handles:
            handle.remove()


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; at least one token of each row is left to generate from."""
    first, last = min(rows), max(rows)  # in sorted order, all rows between these share what these two share
    limit = min(map(len, rows)) - 1
    return next((n for n in range(limit) if first[n] != last[n]), limit)


def pad_after(rows: Sequence[list[int]], shared: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (rows, longest): the shared prefix, then padding, so that all rows end together."""
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[*row[:shared], *[pad_id] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[*[1] * shared, *[0] * gap, *[1] * (longest - shared - gap)] for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)
