"""Projections that share an input, computed as one product with their adapters.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace and the adapters
laid around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter, where adding s B T afterwards would read and write the output again: 8 to 17% of
the product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

from nybble.engine.ops import Operations
from nybble.engine.reference import LowRank, Nested

ALIGNMENT = 8  # numbers: rows of the workspace begin at multiples of 16 bytes, as tensor cores want them


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
class Active:
    """The adapters of a group that are active now."""

    adapters: tuple[Adapter, ...] = ()
    ranks: int = 0
    """Columns they take, rounded up to ALIGNMENT."""
    dropping: bool = False
    """Whether any of them drops inputs."""


class Ineligible(Exception):  # noqa: N818 - a reason, not an error: the layer keeps its own forward
    """Why a layer cannot be fused, in words for the run's report."""


class Group:
    """Frozen projections with one input.

    Args:
        names: as they are called in the layer, for reports.
        modules: linear layers, or PEFT's LoRA around them.

    Raises:
        Ineligible: something the fused product does not know.
    """

    def __init__(self, names: Sequence[str], modules: Sequence[torch.nn.Module]) -> None:
        self.names = tuple(names)
        self.modules = tuple(modules)
        for name, module in zip(names, modules, strict=True):
            _check(name, module)
        self.bases = tuple(base_of(module) for module in modules)
        self.outputs = sum(base.out_features for base in self.bases)
        self.inputs: int = self.bases[0].in_features
        self.adapted = tuple(module for module in modules if isinstance(module, LoraLayer))
        self._frozen: list[_Frozen] = []
        self._state: list[Any] | None = None
        self._active = Active()

    def active(self) -> Active:
        """The adapters that are active now, none where they are disabled or merged.

        Raises:
            Ineligible: several at once, or of a kind that the fused product does not know.
        """
        self._refresh()
        state = [_state(module) for module in self.adapted]
        if state != self._state:
            self._active = self._find_active()
            self._state = state
        return self._active

    def _find_active(self) -> Active:
        found: list[Adapter] = []
        output = rank = 0
        for name, module, base in zip(self.names, self.modules, self.bases, strict=True):
            if module is not base:
                adapter = _active(name, module, base, output, rank)
                if adapter is not None:
                    found.append(adapter)
                    rank = adapter.ranks.stop
            output += base.out_features
        padded = -(-rank // ALIGNMENT) * ALIGNMENT
        return Active(tuple(found), padded, any(adapter.dropout for adapter in found))

    def write(self, operations: Operations, matrix: torch.Tensor) -> None:
        """Fill the weights into the upper left of a matrix of more rows and columns."""
        row = 0
        for base, frozen in zip(self.bases, self._frozen, strict=True):
            out = matrix[row : row + base.out_features, : self.inputs]
            row += base.out_features
            if frozen.code is None:
                out.copy_(frozen.weight)
            else:
                operations.dequantize(frozen.weight, frozen.absmax, frozen.code, frozen.blocksize, frozen.nested, out)

    def _refresh(self) -> None:
        """Weights as plain tensors: what bitsandbytes wraps them in costs 2 us a use. They change when PEFT merges."""
        weights = [base._parameters["weight"] for base in self.bases]
        if len(self._frozen) == len(weights) and all(
            frozen.owner is weight and frozen.place == weight.data_ptr()
            for frozen, weight in zip(self._frozen, weights, strict=True)
        ):
            return
        self._frozen = [_Frozen.of(weight) for weight in weights]  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Frozen:
    """A frozen weight taken apart."""

    owner: torch.nn.Parameter
    place: int
    weight: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor | None
    blocksize: int
    nested: Nested | None

    @classmethod
    def of(cls, owner: torch.nn.Parameter) -> _Frozen:
        weight = owner.detach().as_subclass(torch.Tensor)
        state = getattr(owner, "quant_state", None)
        if state is None:
            return cls(owner, owner.data_ptr(), weight, weight, None, 0, None)
        nested = None
        if state.nested:
            nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        return cls(owner, owner.data_ptr(), weight, state.absmax, state.code, state.blocksize, nested)


def base_of(module: torch.nn.Module) -> torch.nn.Linear:
    """The frozen layer below PEFT's."""
    base: torch.nn.Linear = module._modules["base_layer"] if isinstance(module, LoraLayer) else module  # type: ignore[assignment]
    return base


class Matrix:
    """A group's weights with the adapters around them, in the workspace; good until the workspace is filled anew.

    Attributes:
        forward: [W | s B] transposed, (inputs + ranks, outputs)
        backward: [W ; A], (outputs + ranks, inputs)
        weights: W, (outputs, inputs)
        down: A of all adapters, (ranks, inputs)
        up: s B of all adapters, (outputs, ranks), zero where an adapter does not add to an output
    """

    def __init__(self, whole: torch.Tensor, outputs: int, inputs: int) -> None:
        self.whole = whole
        self.outputs = outputs
        self.inputs = inputs
        self.ranks = whole.shape[1] - inputs
        self.forward = whole[:outputs].t()
        self.backward = whole[:, :inputs]
        self.weights = whole[:outputs, :inputs]
        self.down = whole[outputs:, :inputs]
        self.down_transposed = self.down.t()
        self.up = whole[:outputs, inputs:]


class Workspace:
    """Buffers that all layers share, one after another on one stream.

    Groups that are needed at once get a slot each; where they follow one another they may share one.
    """

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype, int, int, int], Matrix] = {}
        self._held: dict[str, tuple[Group, Matrix]] = {}

    def forget(self) -> None:
        """A layer begins: what stands in the slots is another's, or from before the optimiser's step."""
        self._held.clear()

    def reserve(self, slot: str, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have room before the first use, so that a slot never grows and leaves a hole behind."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numbers:
            self._held.clear()
            self._matrices.clear()
            self._buffers.pop((slot, dtype), None)
            self._buffers[slot, dtype] = torch.empty(numbers, dtype=dtype, device=device)

    def matrix(self, group: Group, active: Active, slot: str, dtype: torch.dtype) -> Matrix:
        """The group's matrix, filled unless it still stands in its slot, which `reserve` has made room in."""
        held = self._held.get(slot)
        if held is not None and held[0] is group:
            return held[1]
        key = (slot, dtype, group.outputs, group.inputs, active.ranks)
        result = self._matrices.get(key)  # layers are alike, and so are their matrices
        if result is None:
            rows, columns = group.outputs + active.ranks, group.inputs + active.ranks
            whole = self._buffers[slot, dtype][: rows * columns].view(rows, columns)
            result = self._matrices[key] = Matrix(whole, group.outputs, group.inputs)
        group.write(self.operations, result.whole)
        if active.adapters:
            laid = [
                LowRank(own.a.detach(), own.b.detach(), own.scaling, own.outputs.start, own.ranks.start)
                for own in active.adapters
            ]
            self.operations.pack_adapters(laid, result.whole, group.outputs, group.inputs)
        self._held[slot] = (group, result)
        return result


def _check(name: str, module: torch.nn.Module) -> None:
    if type(module) not in (LoraLinear4bit, LoraLinear, Linear4bit, torch.nn.Linear):
        raise Ineligible(f"{name} is a {type(module).__module__}.{type(module).__qualname__}")
    base: Any = base_of(module)
    if type(base) not in (Linear4bit, torch.nn.Linear):
        raise Ineligible(f"{name} stands on a {type(base).__qualname__}")
    if base.bias is not None:
        raise Ineligible(f"{name} has a bias")
    if base.weight.requires_grad:
        raise Ineligible(f"{name}'s base weight is trained")
    state = getattr(base.weight, "quant_state", None)
    if type(base) is Linear4bit:
        if state is None:
            raise Ineligible(f"{name} is not quantised yet: move the model to its device first")
        if base.in_features % state.blocksize:
            raise Ineligible(f"{name}: rows of {base.in_features} are no multiple of the block size {state.blocksize}")
        if getattr(state, "packing_format_for_cpu", False):
            raise Ineligible(f"{name} was repacked for inference on a CPU")
    if getattr(module, "fan_in_fan_out", False):
        raise Ineligible(f"{name} holds its weight transposed")


def _state(module: Any) -> tuple[Any, ...]:
    """Everything that `_active` looks at, read without nn.Module's slow attributes: it is compared at every batch."""
    own = module.__dict__
    parts, active = own["_modules"], own["_active_adapter"]
    keys = (active,) if isinstance(active, str) else tuple(active)
    tensors = [
        (
            id(parts["lora_A"]._modules[key]._parameters["weight"]),
            id(parts["lora_B"]._modules[key]._parameters["weight"]),
        )
        for key in keys
        if key in parts["lora_A"]._modules
    ]
    dropping = [parts["lora_dropout"]._modules[key].training for key in keys if key in parts["lora_dropout"]._modules]
    scaling = [own["scaling"].get(key) for key in keys]
    hooked = bool(own["_forward_pre_hooks"] or own["_forward_hooks"])
    return (own["_disable_adapters"], tuple(own["merged_adapters"]), keys, tensors, dropping, scaling, hooked)


def _active(name: str, module: Any, base: torch.nn.Linear, output: int, rank: int) -> Adapter | None:
    if module._forward_pre_hooks or module._forward_hooks:
        raise Ineligible(f"{name} has hooks of somebody else")
    if module.disable_adapters:
        if module.merged:
            raise Ineligible(f"{name} is disabled while merged, so PEFT unmerges it")
        return None
    if module.merged:
        return None
    parts = module._modules
    down = parts["lora_A"]._modules
    active = [adapter for adapter in module.active_adapters if adapter in down]
    if not active:
        return None
    if len(active) > 1:
        raise Ineligible(f"{name} has {len(active)} active adapters")
    key = active[0]
    variant = module.lora_variant.get(key)
    if variant is not None:
        raise Ineligible(f"{name} has the LoRA variant {type(variant).__name__.removesuffix('LinearVariant')}")
    a, b = down[key]._parameters, parts["lora_B"]._modules[key]._parameters
    if a["bias"] is not None or b["bias"] is not None:
        raise Ineligible(f"{name}'s adapter has a bias")
    dropout = parts["lora_dropout"]._modules[key]
    share = dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    ranks = slice(rank, rank + a["weight"].shape[0])
    outputs = slice(output, output + base.out_features)
    return Adapter(a["weight"], b["weight"], float(module.scaling[key]), share, outputs, ranks)
