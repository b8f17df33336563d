"""Projections that share an input, as the engine sees them: frozen weights, and the adapters that are active now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

from nybble.kernels.reference import Nested
from nybble.weights.structure import check_lora, check_quantised, check_state
from nybble.weights.watch import Watched

ALIGNMENT = 8  # numbers: rows of the workspace begin at multiples of 16 bytes, as tensor cores want them


class Ineligible(Exception):  # noqa: N818 - a reason, not an error: the layer keeps its own forward
    """Why a layer cannot be fused, in words for the run's report."""


@dataclass(frozen=True)
class Adapter:
    """The active adapter of one projection, as PEFT holds it now."""

    a: torch.nn.Parameter
    """(r, inputs)"""
    b: torch.nn.Parameter
    """(outputs, r)"""
    scaling: float
    dropout: float
    outputs: slice
    """Its place among the group's outputs."""
    ranks: slice
    """Its place among the group's ranks."""


@dataclass(frozen=True)
class Frozen:
    """A frozen weight as plain tensors: what bitsandbytes wraps them in costs 2 us a use."""

    outputs: int
    weight: torch.Tensor
    """(outputs, inputs), or bytes of two codes each."""
    absmax: torch.Tensor
    code: torch.Tensor | None
    """None where the weight is not quantised."""
    blocksize: int
    nested: Nested | None


@dataclass(frozen=True)
class Group:
    """Frozen projections with one input, and their adapters; none of those where PEFT has them disabled or merged."""

    frozen: tuple[Frozen, ...]
    adapters: tuple[Adapter, ...]
    inputs: int
    outputs: int
    ranks: int
    """Columns that the adapters take, rounded up to ALIGNMENT."""
    dropping: bool
    """Whether any adapter drops inputs."""
    compute_dtype: torch.dtype | None
    """In which 4-bit layers say they compute."""


def read_group(watched: Watched, parent: torch.nn.Module, names: Sequence[str]) -> Group:
    """The projections of these names in a module, as they are now.

    Raises:
        Ineligible: something the fused product does not know.
    """
    frozen: list[Frozen] = []
    adapters: list[Adapter] = []
    output = rank = 0
    for name in names:
        module = watched.module(parent, name)
        if type(module) not in (LoraLinear4bit, LoraLinear, Linear4bit, torch.nn.Linear):
            raise Ineligible(f"{name} is a {type(module).__module__}.{type(module).__qualname__}")
        if isinstance(module, LoraLayer):
            check_lora(module)
        base = watched.module(module, "base_layer") if isinstance(module, LoraLayer) else module
        frozen.append(_read_base(watched, name, base))
        adapter = _read_adapter(watched, name, module, base, output, rank) if module is not base else None
        if adapter is not None:
            adapters.append(adapter)
            rank = adapter.ranks.stop
        output += base.out_features
    return Group(
        tuple(frozen), tuple(adapters), base.in_features, output, -(-rank // ALIGNMENT) * ALIGNMENT,
        any(adapter.dropout for adapter in adapters), watched.attribute(base, "compute_dtype"),
    )  # fmt: skip


def _read_base(watched: Watched, name: str, base: Any) -> Frozen:
    if type(base) not in (Linear4bit, torch.nn.Linear):
        raise Ineligible(f"{name} is built on a {type(base).__qualname__}")
    check_unhooked(watched, name, base)
    if watched.parameter(base, "bias") is not None:
        raise Ineligible(f"{name} has a bias")
    weight = watched.parameter(base, "weight")
    if type(weight) not in (torch.nn.Parameter, Params4bit):
        raise Ineligible(f"{name}'s weight is a {type(weight).__qualname__}")
    if watched.is_trained(weight):
        raise Ineligible(f"{name}'s base weight is trained")
    watched.place(weight)
    if type(base) is torch.nn.Linear:
        if weight.shape != (base.out_features, base.in_features):
            raise Ineligible(f"{name}'s weight of shape {tuple(weight.shape)} is only a part of it")
        plain = weight.detach()
        return Frozen(base.out_features, plain, plain, None, 0, None)
    return _read_quantized(watched, name, base, weight)


def _read_quantized(watched: Watched, name: str, base: Linear4bit, weight: Any) -> Frozen:
    check_quantised(base, weight)
    state = watched.attribute(weight, "quant_state")
    if state is None:
        raise Ineligible(f"{name} is not quantised yet: move the model to its device first")
    check_state(state)
    if base.in_features % state.blocksize:
        raise Ineligible(f"{name}: rows of {base.in_features} are not a multiple of the block size {state.blocksize}")
    if getattr(state, "packing_format_for_cpu", False):
        raise Ineligible(f"{name} was repacked for inference on a CPU, and gradients would be wrong: reload it")
    with torch.inference_mode(False):
        codes = weight.detach().as_subclass(torch.Tensor).view(torch.uint8)
    if 2 * codes.numel() != base.out_features * base.in_features:
        raise Ineligible(f"{name}'s weight of {codes.numel()} bytes is only a part of it")
    nested = None
    if state.nested:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    return Frozen(base.out_features, codes, state.absmax, state.code, state.blocksize, nested)


def _read_adapter(watched: Watched, name: str, module: Any, base: Any, output: int, rank: int) -> Adapter | None:
    check_unhooked(watched, name, module)
    merged = watched.words(watched.attribute(module, "merged_adapters"))
    if watched.attribute(module, "_disable_adapters"):
        if merged:
            raise Ineligible(f"{name} is disabled while merged, so PEFT unmerges it")
        return None
    if merged:
        return None
    named = watched.attribute(module, "_active_adapter")
    keys = (named,) if isinstance(named, str) else watched.words(named)
    downs, ups = watched.module(module, "lora_A"), watched.module(module, "lora_B")
    active = [key for key in keys if watched.module(downs, key) is not None]
    if not active:
        return None
    if len(active) > 1:
        raise Ineligible(f"{name} has {len(active)} active adapters")
    key = active[0]
    variant = watched.item(module.lora_variant, key)
    if variant is not None:
        raise Ineligible(f"{name} has the LoRA variant {type(variant).__name__.removesuffix('LinearVariant')}")
    if watched.attribute(module, "fan_in_fan_out"):
        raise Ineligible(f"{name} stores its weight transposed")
    down, up = watched.module(downs, key), watched.module(ups, key)
    for part in (down, up):
        check_unhooked(watched, f"{name}'s adapter", part)
        if watched.parameter(part, "bias") is not None:
            raise Ineligible(f"{name}'s adapter has a bias")
    a, b = watched.parameter(down, "weight"), watched.parameter(up, "weight")
    if type(a) is not torch.nn.Parameter or type(b) is not torch.nn.Parameter:
        raise Ineligible(f"{name}'s adapter is a {type(a).__qualname__}")
    return Adapter(
        a, b, float(watched.item(watched.attribute(module, "scaling"), key)), _read_dropout(watched, name, module, key),
        slice(output, output + base.out_features), slice(rank, rank + a.shape[0]),
    )  # fmt: skip


def _read_dropout(watched: Watched, name: str, module: Any, key: str) -> float:
    dropout = watched.module(watched.module(module, "lora_dropout"), key)
    check_unhooked(watched, f"{name}'s dropout", dropout)
    if not isinstance(dropout, torch.nn.Dropout):
        return 0.0
    share: float = watched.attribute(dropout, "p")
    return share if watched.attribute(dropout, "training") else 0.0


def check_unhooked(watched: Watched, name: str, module: Any) -> None:
    """A module inside a fused layer is not called, so nobody may wait for that.

    Raises:
        Ineligible: somebody does.
    """
    if watched.is_hooked(module):
        raise Ineligible(f"{name} has other hooks")
