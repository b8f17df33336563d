"""What a fused decoder layer keeps for its backward, and how many rows are computed at once.

The policies form a ladder: each keeps what the one before it keeps and more, and recomputes less. Shares of a layer's
forward products that are computed again, for Llama 2 7B: keep-all none, drop-mlp 45%, drop-qkv 69%, layer-input and
host 78% and the attention. The base is frozen, so backward has no weight gradients and a recomputation weighs more than
in full fine-tuning: it adds up to half of the forward and backward together.
"""

from __future__ import annotations

HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL = "host", "layer-input", "drop-qkv", "drop-mlp", "keep-all"
LADDER = (HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL)
"""From the leanest to the fastest."""

WIDE_TILE, MIDDLE_TILE, NARROW_TILE = 8192, 4096, 2048
"""Tokens that the projections take at once: where much is kept, where memory is short, and where it is very short. Larger tiles
save launches and fill the card better, smaller ones save 90 KB a token for Llama 2 7B (docs/benchmarks.md)."""
MIDDLE = range(4097, 16385)
"""Tokens of a batch from which the narrow tile would make many small products, and up to which the middle one is affordable:
a longer context is there because memory is scarce."""

LOSS_CHUNK = 1024  # rows: 65 MB of logits for Llama 2, and 2,048 rows are no faster (docs/benchmarks.md)
LOSS_MULTIPLE = 256
"""Rows of a chunk are filled up to a multiple of this on a device whose products take a kernel by their shape: what is to be
predicted differs from batch to batch, and each number of rows that an H200 meets for the first time costs 4 to 8 ms."""


def tile(policy: str, tokens: int) -> int:
    """Tokens per tile under a policy, in a batch of so many."""
    if policy in (KEEP_ALL, DROP_MLP):
        return WIDE_TILE
    return MIDDLE_TILE if tokens in MIDDLE else NARROW_TILE
