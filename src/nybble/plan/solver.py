"""Chooses the mix of policies that fits in the available memory."""

from __future__ import annotations

from nybble.plan.ledger import kept_bytes
from nybble.plan.policies import KEEP_ALL, LADDER
from nybble.plan.shapes import LayerShape


def mix(shape: LayerShape, layers: int, tokens: int, budget: int) -> tuple[str, ...]:
    """The fastest mix of policies whose kept activations fit: the highest rung of the ladder that fits for all layers, and one
    rung higher for as many layers as still fit, the last ones first (their memory is freed first).

    Args:
        shape: a layer's sizes.
        layers: number of layers.
        tokens: tokens of a batch.
        budget: bytes for what all layers keep; if not even `host` fits, all layers get `host`.
    """
    lower = 0
    while lower + 1 < len(LADDER) and layers * tokens * kept_bytes(LADDER[lower + 1], shape) <= budget:
        lower += 1
    if lower + 1 == len(LADDER):
        return (KEEP_ALL,) * layers
    small, large = (tokens * kept_bytes(LADDER[rung], shape) for rung in (lower, lower + 1))
    raised = max(0, (budget - layers * small) // (large - small))
    return (LADDER[lower],) * (layers - raised) + (LADDER[lower + 1],) * raised
