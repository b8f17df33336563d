"""How many tokens' keys and values fit into memory."""

from __future__ import annotations

from transformers import PreTrainedModel

from nybble.plan.free_memory import device_memory
from nybble.plan.generation_bytes import kv_cache_bytes_per_token
from nybble.plan.shapes import ModelShape

SHARE = 0.4  # of the free memory, for a batch's keys and values: each layer's exist twice while they grow by a token


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values fit into the memory that is free now."""
    shape = ModelShape.from_config(model.config.to_dict())
    return max(1, int(SHARE * device_memory(model.device).free / kv_cache_bytes_per_token(shape, model.dtype.itemsize)))
