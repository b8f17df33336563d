"""The policies for what a fused decoder layer keeps for its backward, and how many tokens are computed at once.

The policies form a ladder: each keeps more than the one before it and recomputes less. The share of a layer's forward products
that is recomputed, for Llama 2 7B: keep-all none, drop-mlp 45%, drop-qkv 69%, layer-input and host 78% and the attention. The
base is frozen, so backward has no weight gradients and recomputation weighs more than in full fine-tuning: it adds up to half of
forward and backward together.
"""

from __future__ import annotations

HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL = "host", "layer-input", "drop-qkv", "drop-mlp", "keep-all"
LADDER = (HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL)
"""From the leanest to the fastest."""

WIDE_TILE, MIDDLE_TILE, NARROW_TILE = 8192, 4096, 2048
"""Tokens per tile of the projections: if much is kept, if memory is short, and if it is very short. Larger tiles save launches
and use the GPU better; smaller ones save 90 KB per token for Llama 2 7B (docs/benchmarks.md)."""
MIDDLE_TILE_BATCHES = range(4097, 16385)
"""Sizes of a batch, in tokens, for the middle tile: in smaller ones narrow tiles make few small products, and in larger ones
memory is too scarce for more than narrow tiles."""

LOSS_CHUNK = 1024  # rows: 65 MB of logits for Llama 2, and 2,048 rows are no faster (docs/benchmarks.md)
LOSS_MULTIPLE = 256
"""Chunks are padded to a multiple of this many rows on devices that choose the kernel of a product by its shape: the number of
predicted tokens differs from batch to batch, and each new number of rows costs 4 to 8 ms on an H200."""


def tile(policy: str, tokens: int) -> int:
    """Tokens per tile under a policy, in a batch of this many tokens."""
    if policy in (KEEP_ALL, DROP_MLP):
        return WIDE_TILE
    return MIDDLE_TILE if tokens in MIDDLE_TILE_BATCHES else NARROW_TILE
