"""Numbers and names in config.json that a model of people's never has: sizes that fill memory or time, and code to be fetched."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from nybble.errors import ModelError

MOST: Mapping[str, int] = {
    "num_hidden_layers": 1000,
    "vocab_size": 10_000_000,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 8192,
    "max_position_embeddings": 1 << 30,
}
"""Eight times Llama 3.1 405B and more. A model is built without memory before its weights are read, a layer in 5 ms."""
ATTENTION = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}
)
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def refuse_hostile(config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Refuse a configuration that would take all memory or time, or fetch code.

    Raises:
        ModelError: naming the field.
    """
    file = folder / "config.json"
    fix = "compare it with config.json on the model's page"
    for name, most in MOST.items():
        value = config.get(name)
        if isinstance(value, int | float) and value > most:
            shown = f"{value:,}" if value < 10**18 else "a number of many digits"
            raise ModelError(f"{name} is {shown}; nybble takes up to {most:,}", where=str(file), fix=fix)
    for name in ATTENTION_FIELDS:
        value = config.get(name)
        if value is not None and not (isinstance(value, str) and value in ATTENTION):
            raise ModelError(
                f"{name} is {value!r:.60}: Transformers would fetch code of that name, and nybble runs none that a model names",
                where=str(file),
                fix=f'delete "{name}" there: nybble chooses the attention itself',
            )
