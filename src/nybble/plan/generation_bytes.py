"""Bytes that generation takes on its device: the cache of keys and values, and what the decoder works in. torch is not loaded."""

from __future__ import annotations

from nybble.plan.shapes import ModelShape

SAMPLED_BYTES = (
    60  # for each logit: two copies in float32, softmax and sums in float64, and an order in int64 with its inverse
)
SUMS = 6  # buffers for each output of a product: two to three chunks of K, in graphs of nine sizes that halve


def kv_cache_bytes_per_token(shape: ModelShape, element: int) -> int:
    """Keys and values of a token in all layers: 0.5 MB on Llama 2 7B in 16 bits.

    Args:
        shape: the model's sizes.
        element: bytes of a number.
    """
    return 2 * shape.layers * shape.key_value_heads * shape.head_size * element


def decoder_workspace_bytes(shape: ModelShape, rows: int, chunk: int) -> int:
    """About what the decoder takes on a GPU beside weights and cache, most of it the largest group of projections in 16 bits.

    0.51 GB on Llama 2 7B, where 0.67 were reserved with an adapter of rank 16, whose copies (80 MB) are not in it: whoever relies
    on it leaves a tenth of the memory free.

    Args:
        shape: the model's sizes.
        rows: of its largest step.
        chunk: tokens of prompts that are computed in one pass.
    """
    widest = 2 * shape.intermediate
    dequantised = 2 * widest * shape.hidden
    prompts = chunk * (3 * 4 * shape.hidden + 2 * 2 * widest)
    sampled = rows * shape.vocabulary * SAMPLED_BYTES
    steps = 4 * rows * SUMS * (widest + 2 * shape.hidden + (shape.heads + 2 * shape.key_value_heads) * shape.head_size)
    return dequantised + prompts + sampled + steps
