"""4-bit layers on a CPU: weights that must not be repacked, and plain layers for generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import PreTrainedModel

from nybble.plan.free_memory import host_memory
from nybble.weights.frozen import dequantised, is_repacked, linear4bits
from nybble.weights.moving import stays
from nybble.weights.structure import check_repacking_switch

SHARE = 0.25  # of the available memory, for weights that could also stay quantised


def stay_unpacked(model: torch.nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    On processors with AVX512-BF16 bitsandbytes repacks a weight at the first forward in eval mode. After that the
    backward pass and dequantize_4bit silently read it wrongly (0.50.2: gradients at a cosine of 0.07).

    Raises:
        EngineError: the installed bitsandbytes has no such setting.
    """
    for module in linear4bits(model):
        check_repacking_switch(module)
        module.support_avx512bf16_for_cpu = False


def assert_unpacked(model: torch.nn.Module) -> None:
    """Check that `stay_unpacked` worked, before training, dequantising and merging."""
    for module in linear4bits(model):
        assert not is_repacked(module.weight), "a 4-bit weight was repacked for inference"


def dequantise_if_it_fits(model: PreTrainedModel | PeftModel) -> bool:
    """On a CPU with enough memory, replace the 4-bit layers by plain ones with the same dequantised weights.

    On a CPU bitsandbytes dequantises a weight at each use (docs/benchmarks.md has the cost for SmolLM2). For generation only:
    training, merging and exporting need the 4-bit layers. Returns whether it was done.
    """
    return bool(_replace_if_it_fits(model))


@contextlib.contextmanager
def temporarily_dequantised(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """As `dequantise_if_it_fits`, and put the same 4-bit layers back afterwards."""
    replaced = _replace_if_it_fits(model)
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer)


def _replace_if_it_fits(model: PreTrainedModel | PeftModel) -> list[tuple[torch.nn.Module, str, Linear4bit]]:
    """Replace 4-bit layers by plain ones; returns the 4-bit ones with parent and name, none if nothing was replaced."""
    layers = list(linear4bits(model))
    if not layers or any(part.device.type != "cpu" for part in model.parameters()):  # those of a GPU may be on the host
        return []
    if any(map(stays, layers)):  # those that are spread over processes are not here
        return []
    dtype = model.get_input_embeddings().weight.dtype
    # In a checkpoint that came quantised, 4-bit layers may cast to another type and back.
    if any(layer.compute_dtype != dtype for layer in layers):
        return []
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    if numbers * dtype.itemsize > SHARE * host_memory().free:
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
