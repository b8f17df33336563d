"""What bitsandbytes' 4-bit layers need on a CPU: weights that stay as they are, and plain layers for answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.plan.free_memory import host_memory
from nybble.weights.frozen import dequantised, is_repacked, linear4bits
from nybble.weights.structure import check_switch

SHARE = 0.25  # of the memory that is available, for weights that could be without it


def stay_unpacked(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    On processors with AVX512-BF16 bitsandbytes repacks a weight at the first forward in eval mode. After that the
    backward pass and dequantise_4bit read it wrongly and nothing says so (0.50.2: gradients at a cosine of 0.07).

    Raises:
        EngineError: the installed bitsandbytes has no such switch.
    """
    for module in linear4bits(model):
        check_switch(module)
        module.support_avx512bf16_for_cpu = False


def assert_unpacked(model: torch.nn.Module) -> None:
    """Check that `stay_unpacked` worked, before training, dequantising and merging."""
    for module in linear4bits(model):
        assert not is_repacked(module.weight), "a 4-bit weight was repacked for inference"


def dequantise_where_room(model: PreTrainedModel | PeftModel) -> bool:
    """On a CPU with room for it, plain layers with the very numbers that the 4-bit ones would compute with, in their place.

    bitsandbytes dequantises a weight at each use there (docs/benchmarks.md: what that costs SmolLM2). For answers only: what
    trains, merges or exports wants the 4-bit layers. Returns whether it was done.
    """
    return bool(_replace_where_room(model))


@contextlib.contextmanager
def dequantised_meanwhile(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """As `dequantise_where_room`, and then the 4-bit layers again, the very ones."""
    replaced = _replace_where_room(model)
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


def _replace_where_room(model: PreTrainedModel | PeftModel) -> list[tuple[torch.nn.Module, str, Linear4bit]]:
    """Plain layers for 4-bit ones; returns these with parent and name, none where that cannot or should not be done."""
    layers = list(linear4bits(model))
    if not layers or any(layer.weight.device.type != "cpu" for layer in layers):
        return []
    computing = model.get_input_embeddings().weight.dtype
    if any(
        layer.compute_dtype != computing for layer in layers
    ):  # stored by somebody else: a 4-bit layer casts in and out
        return []
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    if numbers * computing.itemsize > SHARE * host_memory().free:
        return []
    replaced = []
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                setattr(parent, name, _plain(layer))
                replaced.append((parent, name, layer))
    return replaced


def _plain(layer: Linear4bit) -> torch.nn.Linear:
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(dequantised(layer).to(layer.compute_dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain
