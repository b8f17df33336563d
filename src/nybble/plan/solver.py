"""Which mix of save policies fits into the memory there is."""

from __future__ import annotations

from nybble.plan.ledger import kept_bytes
from nybble.plan.policies import KEEP_ALL, LADDER
from nybble.plan.shapes import LayerShape


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
