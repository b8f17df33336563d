"""Frozen weights in 4, 8 or 16 bits, read from bitsandbytes' layers in memory; `stored.py` reads them from files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

from nybble.kernels.reference import Nested
from nybble.weights.structure import check_quantised, check_state
from nybble.weights.watched import Ineligible, Watched, check_unhooked


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen weight as plain tensors: bitsandbytes' wrapper costs 2 us per use."""

    outputs: int
    stored: torch.Tensor
    """(outputs, inputs), or bytes of two codes each."""
    absmax: torch.Tensor
    """(blocks,) scales; `stored` itself where the weight is not quantised."""
    code: torch.Tensor | None
    """The value of each code (NF4's or FP4's table); None where the weight is not quantised."""
    blocksize: int
    nested: Nested | None
    """How the scales are quantised; None where they are not."""

    @property
    def is_quantised(self) -> bool:
        """Whether it is stored in 4 bits."""
        return self.code is not None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that its values are computed from."""
        yield from (self.stored, self.absmax)
        if self.nested is not None:
            yield self.nested.absmax

    def largest(self) -> torch.Tensor:
        """The largest magnitude of its values, () float32; no larger one is possible where they are quantised."""
        if self.code is None:
            return torch.stack(self.stored.aminmax()).abs().amax().float()
        scales = self.absmax
        if self.nested is not None:
            wide = self.nested.absmax.repeat_interleave(self.nested.blocksize)[: scales.numel()]
            scales = self.nested.code[scales.int()] * wide + self.nested.offset
        return scales.abs().amax() * self.code.abs().amax()

    def every_tensor(self) -> Iterator[torch.Tensor]:
        """As `tensors`, and the tables that are the same for all weights."""
        yield from self.tensors()
        if self.code is not None:
            yield self.code
        if self.nested is not None:
            yield from (self.nested.code, self.nested.offset)


def read_frozen(watched: Watched, name: str, layer: Any) -> FrozenWeight:
    """A linear layer's weight in 4 or 16 bits.

    Args:
        watched: records every fact that is read.
        name: the layer's name, for refusals.
        layer: the layer itself, not PEFT's wrapper.

    Raises:
        Ineligible: something that the fused product does not support.
    """
    if type(layer) not in (Linear4bit, torch.nn.Linear):
        raise Ineligible(f"{name} is built on a {type(layer).__qualname__}")
    check_unhooked(watched, name, layer)
    if watched.parameter(layer, "bias") is not None:
        raise Ineligible(f"{name} has a bias")
    weight = watched.parameter(layer, "weight")
    if type(weight) not in (torch.nn.Parameter, Params4bit):
        raise Ineligible(f"{name}'s weight is a {type(weight).__qualname__}")
    if watched.is_trained(weight):
        raise Ineligible(f"{name}'s base weight is trained")
    watched.address(weight)
    if type(layer) is torch.nn.Linear:
        if weight.shape != (layer.out_features, layer.in_features):
            raise Ineligible(f"{name}'s weight of shape {tuple(weight.shape)} is only a part of it")
        plain = weight.detach()
        return FrozenWeight(layer.out_features, plain, plain, None, 0, None)
    return _read_4bit(watched, name, layer, weight)


def _read_4bit(watched: Watched, name: str, layer: Linear4bit, weight: Any) -> FrozenWeight:
    if type(weight) is not Params4bit:
        raise Ineligible(f"{name} is not quantised yet: move the model to its device first")
    check_quantised(layer, weight)
    state = watched.attribute(weight, "quant_state")
    if state is None:
        raise Ineligible(f"{name} is not quantised yet: move the model to its device first")
    check_state(state)
    if layer.in_features % state.blocksize:
        raise Ineligible(f"{name}: rows of {layer.in_features} are not a multiple of the block size {state.blocksize}")
    if is_repacked(weight):
        raise Ineligible(f"{name} was repacked for inference on a CPU, and gradients would be wrong: reload it")
    with torch.inference_mode(False):
        codes = weight.detach().as_subclass(torch.Tensor).view(torch.uint8)
    if 2 * codes.numel() != layer.out_features * layer.in_features:
        raise Ineligible(f"{name}'s weight of {codes.numel()} bytes is only a part of it")
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return FrozenWeight(layer.out_features, codes, state.absmax, state.code, state.blocksize, nested)


def is_quantised(module: torch.nn.Module) -> bool:
    """Whether a module is one of bitsandbytes' linear layers, in 4 or 8 bits."""
    return isinstance(module, Linear4bit | Linear8bitLt)


def linear4bits(model: torch.nn.Module) -> Iterator[Linear4bit]:
    """Every 4-bit linear layer."""
    return (module for module in model.modules() if isinstance(module, Linear4bit))


def is_repacked(weight: torch.Tensor) -> bool:
    """Whether bitsandbytes has repacked a 4-bit weight for inference on a CPU, where nothing else can read it."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def dequantised(layer: Linear4bit) -> torch.Tensor:
    """The weight that a 4-bit layer computes with, (outputs, inputs), in the type it was quantised from."""
    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def scale_bytes(weight: torch.Tensor) -> int:
    """Bytes of a 4-bit weight's scales, nested ones included; 0 for other weights."""
    return sum(state.absmax.numel() * state.absmax.element_size() for state in states(weight))


def float_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """For each parameter, the tensors that show whether it is finite: the parameter itself, or its scales if it is quantised."""
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            scales = module.state.SCB if module.state.SCB is not None else getattr(module.weight, "SCB", None)
            if scales is not None:
                yield f"{name}.weight", scales
    for name, parameter in model.named_parameters():
        quantised = list(states(parameter))
        if not quantised:
            yield name, parameter.detach()
        for state in quantised:
            yield from ((name, part) for part in (state.absmax, state.offset) if part is not None)


def states(weight: torch.Tensor) -> Iterator[Any]:
    """bitsandbytes' states of a 4-bit weight: that of its scales, and that of the scales' own scales."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield state
        state = state.state2
