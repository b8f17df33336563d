"""bitsandbytes' 4-bit layers in a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bitsandbytes.nn import Linear4bit


def stay_unpacked(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    On processors with AVX512-BF16 bitsandbytes repacks a weight at the first forward in eval mode. After that the
    backward pass and dequantise_4bit read it wrongly and nothing says so (0.50.2: gradients at a cosine of 0.07).
    """
    for module in linear4bits(model):
        module.support_avx512bf16_for_cpu = False


def assert_unpacked(model: torch.nn.Module) -> None:
    """Hold `stay_unpacked` to its word, before training, dequantising and merging."""
    for module in linear4bits(model):
        state = getattr(module.weight, "quant_state", None)
        assert not getattr(state, "packing_format_for_cpu", False), "a 4-bit weight was repacked for inference"


def linear4bits(model: torch.nn.Module) -> Iterator[Linear4bit]:
    """Every 4-bit linear layer."""
    return (module for module in model.modules() if isinstance(module, Linear4bit))
