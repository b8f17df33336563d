"""Checks of config.json, before anything is built from it; without torch, since a plan takes no longer than a second.

Transformers checks the types. Refused here are values that it accepts but with which torch fails or computes nothing but NaN,
that would take endless memory or time, or for which code would be fetched.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from nybble.errors import ModelError
from nybble.plan.shapes import head_size
from nybble.terminal import first_of

LIMITS: Mapping[str, int] = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 8192,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1 << 30,
}
"""At least eight times the sizes of Llama 3.1 405B. Before its weights are read, a model is built without memory, in 5 ms per
layer."""
ROPE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
        "beta_fast", "beta_slow")  # fmt: skip
ATTENTION = frozenset(
    {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}
)
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
STORAGES = ("nf4", "fp4", "int8")
FIX = "compare it with config.json on the model's page"


def check_fields(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of a model that cannot compute, would take endless memory, or would run code of its own.

    Raises:
        ModelError: naming the first field and its value.
    """
    _refuse_code(file, config)
    for name, most in LIMITS.items():
        value = config.get(name)
        if isinstance(value, int | float) and value > most:
            shown = f"{value:,}" if value < 10**18 else "a number of many digits"
            raise ModelError(f"{name} is {shown}; nybble accepts up to {most:,}", where=str(file), fix=FIX)
    odd = [*_odd_sizes(config), *_odd_numbers(config)]
    if odd:
        raise ModelError(
            f"config.json does not describe a working model: {first_of(odd)}",
            where=str(file),
            fix=FIX,
        )


def check_architecture(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that is not of the Llama architecture.

    Raises:
        ModelError: it says which it is.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"the architecture is {kind!r}; nybble trains Llama-architecture models (model_type llama: Llama 2, "
            "Llama 3, CodeLlama, Vicuna, TinyLlama, SmolLM2, ...)",
            where=str(file),
            fix='use a model whose config.json says "model_type": "llama"',
        )


def quantized_as(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint that came quantised by bitsandbytes is stored, by its config.json: nf4, fp4 or int8; None for others."""
    stored = config.get("quantization_config")
    if stored is None:
        return None
    return str(stored.get("bnb_4bit_quant_type", "fp4")) if stored.get("load_in_4bit") else "int8"


def check_storage(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that came quantised in a way that nybble cannot train on.

    Raises:
        ModelError: it says which.
    """
    stored = config.get("quantization_config")
    if stored is not None and stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ModelError(
            f"the checkpoint is quantised by {stored['quant_method']}, which nybble cannot train adapters on",
            fix="use the 16-bit checkpoint it was made from",
        )
    if stored is not None and (kind := quantized_as(config)) not in STORAGES:
        raise ModelError(
            f"quantization_config stores weights as {kind}, which nybble does not support ({', '.join(STORAGES)})",
            where=str(file),
            fix="use the 16-bit checkpoint it was made from",
        )


def _refuse_code(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    for name in ATTENTION_FIELDS:
        value = config.get(name)
        if value is not None and not (isinstance(value, str) and value in ATTENTION):
            raise ModelError(
                f"{name} is {value!r:.60}: Transformers would fetch code of that name, and nybble runs no such code",
                where=str(file),
                fix=f'delete "{name}" there: nybble chooses the attention itself',
            )


def _odd_sizes(config: Mapping[str, Any]) -> list[str]:
    sizes = {name: config[name] for name in LIMITS if isinstance(config.get(name), int)}
    odd = [f"{name} is {value!r:.40}" for name, value in sizes.items() if value < 1 or value is True]
    heads, groups, hidden = (sizes.get(name) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if odd or not heads or not hidden or hidden % heads:  # Transformers reports the last
        return odd
    width = head_size(sizes)
    if groups and heads % groups:
        return [f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"]
    return [f"head_dim is {width}, and RoPE needs an even number"] if width % 2 else []


def _odd_numbers(config: Mapping[str, Any]) -> list[str]:
    odd = [f"{path} is {value}" for path, value in _floats(config) if not math.isfinite(value)]
    eps, dtype = config.get("rms_norm_eps"), config.get("dtype", config.get("torch_dtype"))
    if isinstance(eps, int | float) and eps < 0:
        odd.append(f"rms_norm_eps is {eps}")
    dropout = config.get("attention_dropout")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        odd.append(f"attention_dropout is {dropout!r:.40}")
    if not isinstance(dtype, str | None):
        odd.append(f"dtype is {dtype!r:.40}")
    for part in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        values = {name: part[name] for name in ROPE if part.get(name) is not None} if isinstance(part, Mapping) else {}
        odd += [
            f"{name} is {value!r:.40}"
            for name, value in values.items()
            if not isinstance(value, int | float) or value <= 0
        ]
    return odd


def _floats(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every float in a configuration, with its path, however deep it is nested."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, float):
            yield path, value
        elif isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(path, part) for part in value]
