"""What a fused decoder layer keeps for its backward, in bytes, and which mix of policies fits a budget.

The policies form a ladder: each keeps what the one before it keeps and more, and recomputes less. Shares of a layer's
forward products that are computed again, for Llama 2 7B: keep-all none, drop-mlp 45%, drop-qkv 69%, layer-input and
host 78% and the attention. The base is frozen, so backward has no weight gradients and a recomputation weighs more than
in full fine-tuning: it adds up to half of the forward and backward together.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL = "host", "layer-input", "drop-qkv", "drop-mlp", "keep-all"
LADDER = (HOST, LAYER_INPUT, DROP_QKV, DROP_MLP, KEEP_ALL)
"""From the leanest to the fastest."""

WIDE_TILE, MIDDLE_TILE, NARROW_TILE = 8192, 4096, 2048
"""Tokens that the projections take at once: where much is kept, where memory is short, and where it is very short. Larger tiles
save launches and fill the card better, smaller ones save 90 KB a token for Llama 2 7B (docs/benchmarks.md)."""
MIDDLE = range(4097, 16385)
"""Tokens of a batch from which the narrow tile would make many small products, and up to which the middle one is affordable:
a longer context is there because memory is scarce."""


def tile(policy: str, tokens: int) -> int:
    """Tokens to a tile under a policy, in a batch of so many."""
    if policy in (KEEP_ALL, DROP_MLP):
        return WIDE_TILE
    return MIDDLE_TILE if tokens in MIDDLE else NARROW_TILE


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer with its adapters."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    ranks: tuple[int, int, int, int]
    """Adapter columns of the groups q-k-v, o, gate-up and down, each rounded up to a multiple of 8."""
    element: int
    """Bytes of a number: 2 for bfloat16 and float16."""
    residual: int
    """Bytes of a number of the residual stream; 4 where somebody made norms and embedding float32."""

    @property
    def query(self) -> int:
        """Outputs of q_proj."""
        return self.heads * self.head_size

    @property
    def qkv(self) -> int:
        """Outputs of q, k and v together."""
        return (self.heads + 2 * self.key_heads) * self.head_size


def kept_bytes(policy: str, shape: LayerShape) -> int:
    """Device bytes a token and layer that a policy keeps from forward to backward."""
    rung = LADDER.index(policy)
    total = 0
    if rung >= LADDER.index(LAYER_INPUT):
        total += shape.hidden * shape.residual  # the layer's input
    if rung >= LADDER.index(DROP_QKV):
        total += shape.hidden * shape.residual  # the residual stream after attention
        total += shape.query * shape.element + 4 * shape.heads  # attention's output and the log of its sums
        total += sum(shape.ranks) * shape.element
    if rung >= LADDER.index(DROP_MLP):
        total += shape.qkv * shape.element
    if rung >= LADDER.index(KEEP_ALL):
        total += (2 * shape.intermediate + shape.ranks[2]) * shape.element
    return total


def dequantised_bytes(shape: LayerShape) -> int:
    """Device bytes of a layer's weights in the type of its activations, with the adapters around them."""
    q, o, g, d = shape.ranks
    numbers = (shape.qkv + q) * (shape.hidden + q) + (shape.hidden + o) * (shape.query + o)
    numbers += (2 * shape.intermediate + g) * (shape.hidden + g) + (shape.hidden + d) * (shape.intermediate + d)
    return numbers * shape.element


def passing_bytes(shape: LayerShape, tokens: int, policy: str) -> int:
    """Device bytes that one layer's backward needs for a while, at its peak, for a batch of so many tokens.

    The larger of two moments: the MLP of one tile (gate, up and their gradients in place, the activation, the norm) beside
    what the layer keeps of all tokens; and attention's backward with its inputs, its output and their gradients.
    """
    hidden, rows = shape.hidden * shape.residual, min(tokens, tile(policy, tokens))
    recomputed = shape.hidden * shape.residual + (shape.qkv + shape.query) * shape.element + 4 * shape.heads
    streams = 2 * hidden + shape.ranks[1] * shape.element  # gradients of the layer's output and of the sum
    mlp = (3 * shape.intermediate + 4 * shape.hidden + sum(shape.ranks)) * shape.element
    at_mlp = tokens * (recomputed + streams + shape.query * shape.element) + rows * mlp
    # flash sums the query's gradient in float32
    attention = (shape.qkv + 2 * shape.query) * shape.element + 4 * shape.query
    return max(at_mlp, tokens * (recomputed + streams + attention))


def mix(shape: LayerShape, layers: int, tokens: int, budget: int) -> tuple[str, ...]:
    """The fastest mix of policies whose kept activations fit: the highest rung that fits all layers, and as many layers
    as still fit one rung higher, the last ones first (they are the first whose memory comes free).

    Args:
        shape: a layer's sizes.
        layers: how many there are.
        tokens: of a batch.
        budget: bytes for what is kept by all layers; what does not even fit `host` gets `host`.
    """
    lower = 0
    while lower + 1 < len(LADDER) and layers * tokens * kept_bytes(LADDER[lower + 1], shape) <= budget:
        lower += 1
    if lower + 1 == len(LADDER):
        return (KEEP_ALL,) * layers
    small, large = (tokens * kept_bytes(LADDER[rung], shape) for rung in (lower, lower + 1))
    raised = max(0, (budget - layers * small) // (large - small))
    return (LADDER[lower],) * (layers - raised) + (LADDER[lower + 1],) * raised
