"""What a batch looks like to attention, read from what the backbone is called with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nybble.engine.attention.backend import Segments
from nybble.engine.branches import Branches, arrange, segments_of
from nybble.engine.padding import Padding, separate, spans_of
from nybble.errors import EngineError


class UnsupportedBatch(Exception):  # noqa: N818 - a reason, not an error: the layers fall back
    """Why the fused layers cannot compute a batch."""


@dataclass(frozen=True)
class BatchLayout:
    """A batch's rows as attention sees them."""

    segments: Segments
    padding: Padding | None = None
    is_packed: bool = False
    """Whether a row may hold several sequences."""
    branches: Branches | None = None
    """Where keys are, if answers share prompts; told by position_ids without cu_seq_lens_q and without a mask."""


def layout_of(inputs: Mapping[str, Any]) -> BatchLayout:
    """How the rows of a batch are divided into sequences, and where they are padded.

    Args:
        inputs: the backbone's keyword arguments. Packed rows are known by `cu_seq_lens_q` and `max_length_q`, as
            DataCollatorWithFlattening passes them, or by position_ids that restart without an attention mask.

    Raises:
        UnsupportedBatch: a cache, a mask that is neither causal nor padding at the ends of rows, or requested attentions.
        EngineError: positions of a packed row that are neither sequences nor branches, or branches beside a mask.
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
        if batch == 1 and positions is not None:
            _refuse_branches_beside(mask, positions)
        return _padded(mask, tokens)
    if positions is not None:
        return _packed(positions.expand(batch, length))
    return BatchLayout(Segments(batch, length))


def has_branches(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch that the fused layers cannot compute has branches: the original forward would take them for sequences.

    Raises:
        EngineError: see `layout_of`.
    """
    positions, others = inputs.get("position_ids"), ("past_key_values", "attention_mask", "cu_seq_lens_q")
    if positions is None or any(inputs.get(name) is not None for name in others):
        return False
    return _packed(positions.expand(tokens_of(inputs).shape[:2])).branches is not None


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


def _refuse_branches_beside(mask: Any, positions: torch.Tensor) -> None:
    """A row with a mask is one sequence, whatever its positions are; those that go back to a position above 0 say otherwise."""
    goes_back = (positions[:, 1:] <= positions[:, :-1]) & (positions[:, 1:] > 0)
    if isinstance(mask, torch.Tensor) and mask.shape == positions.shape:
        goes_back &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if goes_back.any():
        raise EngineError(
            "position_ids say that answers share a prompt in one row, but an attention_mask is given, which makes the row one "
            "sequence",
            fix="leave attention_mask out: packed rows need no mask",
        )


def _packed(positions: torch.Tensor) -> BatchLayout:
    """A segment starts wherever a position is not one more than the position before it."""
    batch, length = positions.shape
    is_start = torch.ones_like(positions, dtype=torch.bool)
    is_start[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = is_start.flatten().nonzero().flatten()
    if len(starts) == batch:
        return BatchLayout(Segments(batch, length))
    tokens = batch * length
    bounds = torch.cat((starts, starts.new_tensor([tokens]))).to(torch.int32)
    begins, firsts = torch.stack((starts, positions.flatten().index_select(0, starts))).tolist()
    longest = max(stop - start for start, stop in itertools.pairwise([*begins, tokens]))
    segments = Segments(batch, length, bounds, longest)
    parts = segments_of(begins, firsts, length, tokens)
    if parts is None:
        return BatchLayout(segments, is_packed=True)
    divided, branches = arrange(parts, segments, positions.device)
    return BatchLayout(divided, is_packed=True, branches=branches)
