"""What a batch looks like to attention, read from what the backbone is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nybble.engine.attention import Segments


class Unfit(Exception):  # noqa: N818 - a reason, not an error: this batch goes the layers' own way
    """Why a batch is not for the fused layers."""


def segments_of(inputs: Mapping[str, Any]) -> Segments:
    """How a batch's rows fall into sequences.

    Args:
        inputs: the backbone's keywords. Packed rows are known by `cu_seq_lens_q` and `max_length_q`, as
            DataCollatorWithFlattening gives them, or by position_ids that begin anew without an attention mask.

    Raises:
        Unfit: a cache, a mask that is neither causal nor padding on the right, or attentions asked for.
    """
    if inputs.get("past_key_values") is not None:
        raise Unfit("a key-value cache")
    if inputs.get("output_attentions"):
        raise Unfit("attentions are asked for")
    given = tokens_of(inputs)
    batch, length = given.shape[:2]
    if inputs.get("cu_seq_lens_q") is not None:
        bounds = inputs["cu_seq_lens_q"].to(device=given.device, dtype=torch.int32)
        longest = inputs.get("max_length_q")
        return Segments(batch, length, bounds, int(bounds.diff().max() if longest is None else longest))
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        _check_mask(mask)
    elif positions is not None:
        return _packed(positions.expand(batch, length))
    return Segments(batch, length)


def tokens_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Token ids, (batch, length), or what was embedded in their place."""
    ids: torch.Tensor | None = inputs.get("input_ids")
    return ids if ids is not None else inputs["inputs_embeds"]


def _check_mask(mask: Any) -> None:
    """A causal row never looks at padding on its right, so such a mask says nothing; any other does."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise Unfit("an attention mask that is not one of padding")
    real = mask.bool()
    if not bool((real[:, 0].all() & (real[:, 1:] <= real[:, :-1]).all()).item()):
        raise Unfit("padding on the left, or an attention mask with holes")


def _packed(positions: torch.Tensor) -> Segments:
    """Sequences begin where positions do not go on by one."""
    batch, length = positions.shape
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    places = begins.flatten().nonzero().flatten()
    if len(places) == batch:
        return Segments(batch, length)
    bounds = torch.cat((places, places.new_tensor([batch * length]))).to(torch.int32)
    return Segments(batch, length, bounds, int(bounds.diff().max()))
