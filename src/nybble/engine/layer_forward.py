"""What replaces a decoder layer's forward while its model is fused."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nybble.engine.layer import LayerCall
from nybble.engine.layer_function import LayerFunction

CALLS = "nybble_calls"  # the keyword argument that the backbone passes on to its layers


def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute what was planned for this layer; without a plan, call the original forward."""
    call: LayerCall | None = kwargs.pop(CALLS, {}).get(self)
    if call is None:
        result: torch.Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return result
    call.batch.set_positions(*kwargs["position_embeddings"])
    fused: torch.Tensor = LayerFunction.apply(hidden_states, call, *call.layer.parameters())  # type: ignore[no-untyped-call]
    return fused


def has_fused_forward(layer: LlamaDecoderLayer) -> bool:
    """Whether the layer still has the forward that `fuse` gave it: a model that was pickled does not."""
    return getattr(layer.__dict__.get("forward"), "__func__", None) is forward
