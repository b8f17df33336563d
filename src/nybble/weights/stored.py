"""What bitsandbytes writes beside a quantised weight in a model's files, and the numbers that such a weight stands for."""

from __future__ import annotations

import math

import torch
from bitsandbytes.utils import unpack_tensor_to_dict

STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
"""Endings behind a weight's name."""
PACKED = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
"""Of the tensor that describes a 4-bit weight."""
INT8 = 127  # LLM.int8 stores a row as integers up to this, and the row's largest number beside it


def row_scales(name: str) -> str:
    """The name of the scales of a weight's rows in LLM.int8."""
    return f"{name.removesuffix('.weight')}.SCB"


def owner(name: str) -> str:
    """The weight that a tensor describes, or its own name; of LLM.int8's scales the layer."""
    return next((name.removesuffix(end) for end in (*STATE, *PACKED) if name.endswith(end)), name)


def expected_parts(
    name: str, shape: tuple[int, ...], kind: str, described: torch.Tensor
) -> tuple[dict[str, int], str | None]:
    """The tensors of a 4-bit weight with the bytes that each must have.

    Args:
        name: the weight's.
        shape: as config.json says.
        kind: the ending, one of PACKED, under which `described` is stored.
        described: bitsandbytes' description.

    Returns:
        Bytes by tensor, and what is wrong with the description itself, or None.
    """
    try:
        state = unpack_tensor_to_dict(described)
        own, block, nested = state["shape"], int(state["blocksize"]), int(state.get("nested_blocksize") or 0)
        is_known = hasattr(torch, state["dtype"]) and kind.endswith(state["quant_type"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}, "it does not describe a 4-bit weight"
    if not is_known or block < 1 or nested < 0:
        return {}, f"it describes a weight that bitsandbytes does not know ({state!r:.80})"
    if list(own) != list(shape):
        return {}, f"it is {own} there and {' x '.join(map(str, shape))} by config.json"
    count = math.prod(shape)
    blocks = -(-count // block)
    sizes = {name: -(-count // 2), f"{name}.absmax": blocks * (1 if nested else 4), f"{name}.quant_map": 16 * 4}
    if nested:
        sizes |= {f"{name}.nested_absmax": -(-blocks // nested) * 4, f"{name}.nested_quant_map": 256 * 4}
    return sizes, None


class StoredWeight:
    """A quantised weight of a model's files, dequantised by the arithmetic that training computes with."""
