"""Bytes of an artefact, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from nybble.export.gguf.quants import BITS, K_QUANTS

ELSEWHERE = "free some space, or --out FOLDER on another disk"
SPARE = 1.02  # headers, tokenizer, card and report come on top


def needed(to: str, parameters: int, quants: Sequence[str] = (), adapter: int = 0) -> int:
    """Bytes of an artefact, with what stands beside it while it is written.

    Args:
        to: adapter, merged or gguf.
        parameters: of the whole model.
        quants: GGUF types.
        adapter: bytes of the adapter.
    """
    if to == "adapter":
        return int(adapter * SPARE)
    if to == "merged":
        return int(2 * parameters * SPARE)
    halfway = BITS["F16"] if set(quants) & set(K_QUANTS) else 0.0
    return int(parameters * (sum(BITS[quant] for quant in quants) + halfway) / 8 * SPARE)


def parameters_of(config: PretrainedConfig) -> int:
    """Of a model of the Llama architecture, by its shapes; biases left out."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = 2 * width * (queries + keys) + 3 * width * inner + 2 * width
    ends = 1 if config.tie_word_embeddings else 2
    return int(config.num_hidden_layers * layer + ends * config.vocab_size * width + width)
