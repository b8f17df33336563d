"""What a batch looks like to attention, read from what the backbone is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nybble.engine.attention.backend import Segments
from nybble.engine.padding import Padding, separate, spans_of


class UnsupportedBatch(Exception):  # noqa: N818 - a reason, not an error: the layers fall back
    """Why the fused layers cannot compute a batch."""


@dataclass(frozen=True)
class BatchLayout:
    """A batch's rows as attention sees them."""

    segments: Segments
    padding: Padding | None = None
    is_packed: bool = False
    """Whether a row may hold several sequences."""


def layout_of(inputs: Mapping[str, Any]) -> BatchLayout:
    """How the rows of a batch are divided into sequences, and where they are padded.

    Args:
        inputs: the backbone's keyword arguments. Packed rows are known by `cu_seq_lens_q` and `max_length_q`, as
            DataCollatorWithFlattening passes them, or by position_ids that restart without an attention mask.

    Raises:
        UnsupportedBatch: a cache, a mask that is neither causal nor padding at the ends of rows, or requested attentions.
    """
    if inputs.get("past_key_values") is not None:
        raise UnsupportedBatch("a key-value cache is given")
    if inputs.get("output_attentions"):
        raise UnsupportedBatch("attentions are requested")
    if inputs.get("is_causal") is False:
        raise UnsupportedBatch("attention is not causal (is_causal=False)")
    tokens = tokens_of(inputs)
    batch, length = tokens.shape[:2]
    if inputs.get("cu_seq_lens_q") is not None:
        bounds = inputs["cu_seq_lens_q"].to(device=tokens.device, dtype=torch.int32)
        longest = inputs.get("max_length_q")
        longest = int(bounds.diff().max() if longest is None else longest)
        return BatchLayout(Segments(batch, length, bounds, longest), is_packed=True)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return _padded(mask, tokens)
    if positions is not None:
        segments = _packed(positions.expand(batch, length))
        return BatchLayout(segments, is_packed=segments.bounds is not None)
    return BatchLayout(Segments(batch, length))


def tokens_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Token ids, (batch, length), or the embeddings that were passed instead."""
    ids: torch.Tensor | None = inputs.get("input_ids")
    return ids if ids is not None else inputs["inputs_embeds"]


def _padded(mask: Any, tokens: torch.Tensor) -> BatchLayout:
    if not isinstance(mask, torch.Tensor) or mask.shape != tokens.shape[:2]:
        raise UnsupportedBatch("an attention mask other than padding")
    spans = spans_of(mask)
    if spans is None:
        raise UnsupportedBatch("an attention mask with holes between real tokens")
    return BatchLayout(*separate(spans, mask.shape[1], tokens.device))


def _packed(positions: torch.Tensor) -> Segments:
    """A sequence starts wherever a position is not one more than the position before it."""
    batch, length = positions.shape
    is_start = torch.ones_like(positions, dtype=torch.bool)
    is_start[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = is_start.flatten().nonzero().flatten()
    if len(starts) == batch:
        return Segments(batch, length)
    bounds = torch.cat((starts, starts.new_tensor([batch * length]))).to(torch.int32)
    return Segments(batch, length, bounds, int(bounds.diff().max()))
