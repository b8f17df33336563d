"""How many tokens' keys and values fit into memory."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

SHARE = 0.4  # of the free memory for a batch's keys and values: growing by a token, a layer's are there twice


def kv_cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Two numbers of head_dim a layer and key-value head: 0.5 MB a token on Llama 2 7B in 16 bits."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize)


def cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values fit into the memory that is free now."""
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return max(1, int(SHARE * free / kv_cache_bytes_per_token(model.config, model.dtype)))
