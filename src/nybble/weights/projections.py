"""Projections that share an input, as the engine sees them: frozen weights, and the adapters that are active now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

from nybble.plan.shapes import ALIGNMENT
from nybble.weights.frozen import FrozenWeight, read_frozen
from nybble.weights.structure import check_lora
from nybble.weights.watched import Ineligible, Watched, check_unhooked


@dataclass(frozen=True)
class ActiveAdapter:
    """The active adapter of one projection, as PEFT holds it now."""

    a: torch.nn.Parameter
    """(r, inputs)"""
    b: torch.nn.Parameter
    """(outputs, r)"""
    scaling: float
    dropout: float
    outputs: slice
    """Which of the group's outputs it adds to."""
    ranks: slice
    """Which of the group's ranks it has."""


@dataclass(frozen=True)
class ProjectionGroup:
    """Frozen projections that share an input, and their adapters; no adapters while PEFT has them disabled or merged."""

    frozen: tuple[FrozenWeight, ...]
    adapters: tuple[ActiveAdapter, ...]
    inputs: int
    outputs: int
    ranks: int
    """Columns that the adapters take, rounded up to ALIGNMENT."""
    has_dropout: bool
    """Whether any adapter has dropout."""
    compute_dtype: torch.dtype | None
    """The compute type of the 4-bit layers; None for others."""

    def stored(self) -> Iterator[torch.Tensor]:
        """The tensors that its weights are dequantised from."""
        for weight in self.frozen:
            yield from weight.tensors()


def read_group(watched: Watched, parent: torch.nn.Module, names: Sequence[str]) -> ProjectionGroup:
    """The projections with these names in a module, as they are now.

    Raises:
        Ineligible: something that the fused product does not support.
    """
    frozen: list[FrozenWeight] = []
    adapters: list[ActiveAdapter] = []
    output = rank = 0
    for name in names:
        module = watched.module(parent, name)
        if type(module) not in (LoraLinear4bit, LoraLinear, Linear4bit, torch.nn.Linear):
            raise Ineligible(f"{name} is a {type(module).__module__}.{type(module).__qualname__}")
        if isinstance(module, LoraLayer):
            check_lora(module)
        base = watched.module(module, "base_layer") if isinstance(module, LoraLayer) else module
        frozen.append(read_frozen(watched, name, base))
        adapter = _read_adapter(watched, name, module, base, output, rank) if module is not base else None
        if adapter is not None:
            adapters.append(adapter)
            rank = adapter.ranks.stop
        output += base.out_features
    return ProjectionGroup(
        tuple(frozen), tuple(adapters), base.in_features, output, -(-rank // ALIGNMENT) * ALIGNMENT,
        any(adapter.dropout for adapter in adapters), watched.attribute(base, "compute_dtype"),
    )  # fmt: skip


def unwrapped(module: Any) -> Any:
    """A linear layer without PEFT's wrapper."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def _read_adapter(watched: Watched, name: str, module: Any, base: Any, output: int, rank: int) -> ActiveAdapter | None:
    check_unhooked(watched, name, module)
    merged = watched.sequence(watched.attribute(module, "merged_adapters"))
    if watched.attribute(module, "_disable_adapters"):
        if merged:
            raise Ineligible(f"{name} is disabled while merged, so PEFT unmerges it")
        return None
    if merged:
        return None
    named = watched.attribute(module, "_active_adapter")
    keys = (named,) if isinstance(named, str) else watched.sequence(named)
    downs = watched.module(module, "lora_A")
    active = [key for key in keys if watched.module(downs, key) is not None]
    if not active:
        return None
    if len(active) > 1:
        raise Ineligible(f"{name} has {len(active)} active adapters")
    return _read_named(watched, name, module, base, active[0], output, rank)


def read_named_adapters(parent: Any, names: Sequence[str], adapter: str) -> tuple[ActiveAdapter, ...]:
    """One adapter of the projections of these names in a module, whether or not it is active.

    Args:
        parent: the module.
        names: of its projections.
        adapter: as PEFT names it.

    Raises:
        Ineligible: something the fused product does not know, or adapters merged into their weights.
    """
    watched, found, output, rank = Watched(), [], 0, 0
    for name in names:
        module = watched.module(parent, name)
        base = unwrapped(module)
        if isinstance(module, LoraLayer):
            check_lora(module)
            check_unhooked(watched, name, module)
            if module.merged_adapters:
                raise Ineligible(f"{name} has a merged adapter")
            if adapter in module.lora_A:
                found.append(_read_named(watched, name, module, base, adapter, output, rank))
                rank = found[-1].ranks.stop
        output += base.out_features
    return tuple(found)


def _read_named(watched: Watched, name: str, module: Any, base: Any, key: str, output: int, rank: int) -> ActiveAdapter:
    downs, ups = watched.module(module, "lora_A"), watched.module(module, "lora_B")
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
    return ActiveAdapter(
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
