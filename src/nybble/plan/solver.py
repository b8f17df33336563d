"""Chooses the mix of policies that fits in the available memory; the engine does so for each batch, the plan beforehand."""

from __future__ import annotations

from typing import NamedTuple

from nybble.plan.ledger import fragment_bytes, kept_bytes, working_set_bytes
from nybble.plan.policies import KEEP_ALL, LADDER, LAYER_INPUT, tile
from nybble.plan.shapes import LayerShape

SLACK = 0.05  # of the limit: what batches of other sizes leave in the allocator


class Division(NamedTuple):
    """The memory of a batch, divided."""

    policies: tuple[str, ...]
    """The policy of each layer."""
    needed: int
    """Bytes that the batch takes."""


def divide(shape: LayerShape, layers: int, tokens: int, free: int, loss: int, extra: int = 0) -> Division:
    """The fastest mix of policies for a batch: wide tiles where memory allows, narrow ones where it does not.

    Args:
        shape: a layer's sizes.
        layers: number of layers.
        tokens: tokens of the batch.
        free: bytes that it may take.
        loss: bytes of its loss.
        extra: bytes that a layer's backward needs beyond what its shape implies.
    """
    for tiled_like in (KEEP_ALL, LAYER_INPUT):
        peak = max(working_set_bytes(shape, tokens, tiled_like) + extra, loss) + fragment_bytes(shape, tokens)
        policies = mix(shape, layers, tokens, free - peak)
        if tile(policies[0], tokens) == tile(tiled_like, tokens):
            break
    return Division(policies, peak + tokens * sum(kept_bytes(policy, shape) for policy in policies))


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
