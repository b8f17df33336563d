"""How fast a recipe may train, from its arithmetic and a card's data sheet. torch is not loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nybble.plan.policies import DROP_MLP, DROP_QKV, KEEP_ALL
from nybble.plan.shapes import LayerShape, ModelShape

REACHED = 0.51
"""Share of the data sheet's rate that training reached on an H100: 0.51 to 0.54 over Llama 2 7B and 13B and Llama 3 8B, kept and
recomputed (docs/benchmarks.md, rows of 4 x 2,048 and 2 x 2,048)."""
FP8_GAIN = 1.39
"""Times as fast as in 16 bits: 1.36 to 1.41 on an H200, Llama 2 7B, kept and recomputed, fast sums (docs/benchmarks.md)."""
CARDS: Mapping[str, float] = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71, "T4": 65,
}  # fmt: skip
"""Dense products in 16 bits with sums in float32, in 10^12 operations a second, as NVIDIA's data sheets have them; the first name
that stands in a card's name counts."""


class Pace(NamedTuple):
    """How fast training may be."""

    tokens_per_second: float
    basis: str
    """What the estimate rests on."""


def products_per_token(layer: LayerShape, shape: ModelShape, policies: Sequence[str]) -> float:
    """Operations for one trained token: forward, the gradient of the input, and what is recomputed; attention is left out."""
    sizes = {
        "qkv": layer.hidden * layer.qkv, "o": layer.query * layer.hidden, "gate_up": 2 * layer.hidden * layer.intermediate,
        "down": layer.intermediate * layer.hidden,
    }  # fmt: skip
    again = {KEEP_ALL: 0, DROP_MLP: sizes["gate_up"], DROP_QKV: sizes["gate_up"] + sizes["qkv"]}
    everything = sizes["gate_up"] + sizes["qkv"] + sizes["o"]
    layers = sum(2 * sum(sizes.values()) + again.get(policy, everything) for policy in policies)
    return 2 * (layers + 2 * shape.hidden * shape.vocabulary)


def attention_per_token(layer: LayerShape, policies: Sequence[str], length: int) -> float:
    """Operations of causal attention for one token of rows of a length: the backward takes 2.5 times the forward."""
    forward = 2 * length * layer.query
    return sum(forward * (3.5 + (policy not in (KEEP_ALL, DROP_MLP, DROP_QKV))) for policy in policies)


def pace(
    layer: LayerShape, shape: ModelShape, policies: Sequence[str], length: int, card: str, *, fp8: bool = False
) -> Pace | None:
    """An estimate for a card; None if its rate is not known.

    Args:
        layer: a layer's sizes.
        shape: the model's.
        policies: of all layers.
        length: tokens of a row.
        card: its name, as NVIDIA's driver gives it.
        fp8: whether all products with frozen weights are in fp8.
    """
    rate = next((rate for name, rate in CARDS.items() if re.search(rf"\b{name}\b", card, re.IGNORECASE)), None)
    if rate is None or "laptop" in card.lower():  # of the same name, at a half to two thirds of the power
        return None
    work = products_per_token(layer, shape, policies) + attention_per_token(layer, policies, length)
    basis = f"{rate:g} TFLOP/s of the {card}'s data sheet, of which an H100 reached {REACHED:.0%}"
    if fp8:
        basis += f", {FP8_GAIN:g} times as fast in fp8, as on an H200"
    return Pace(REACHED * rate * 1e12 / work * (FP8_GAIN if fp8 else 1), basis)
