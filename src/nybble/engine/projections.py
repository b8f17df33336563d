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
from types import ModuleType

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer

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
    first_output: int
    first_rank: int

    @property
    def outputs(self) -> slice:
        """Its place among the group's outputs."""
        return slice(self.first_output, self.first_output + self.b.shape[0])

    @property
    def ranks(self) -> slice:
        """Its place among the group's ranks."""
        return slice(self.first_rank, self.first_rank + self.a.shape[0])


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
        self.outputs = sum(base_of(module).out_features for module in modules)
        self.inputs: int = base_of(modules[0]).in_features

    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters that are active now, none where they are disabled or merged.

        Raises:
            Ineligible: several at once, or of a kind that the fused product does not know.
        """
        found: list[Adapter] = []
        output = rank = 0
        for name, module in zip(self.names, self.modules, strict=True):
            if isinstance(module, LoraLayer):
                adapter = _active(name, module, output, rank)
                if adapter is not None:
                    found.append(adapter)
                    rank += adapter.a.shape[0]
            output += base_of(module).out_features
        return tuple(found)

    def write(self, operations: ModuleType, matrix: torch.Tensor) -> None:
        """Fill the weights into the upper left of a matrix of more rows and columns."""
        row = 0
        for module in self.modules:
            base = base_of(module)
            out = matrix[row : row + base.out_features, : self.inputs]
            row += base.out_features
            weight = base.weight
            state = getattr(weight, "quant_state", None)
            if state is None:
                out.copy_(weight)
                continue
            nested = None
            if state.nested:
                nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
            operations.dequantize(weight, state.absmax, state.code, state.blocksize, nested, out)


def base_of(module: torch.nn.Module) -> torch.nn.Linear:
    """The frozen layer below PEFT's."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module  # type: ignore[return-value]


def ranks_of(adapters: Sequence[Adapter]) -> int:
    """Columns that a group's adapters take, rounded up."""
    ranks = sum(adapter.a.shape[0] for adapter in adapters)
    return -(-ranks // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Matrix:
    """A group's weights with the adapters around them, in the workspace; good until the workspace is filled anew."""

    whole: torch.Tensor
    outputs: int
    inputs: int

    @property
    def ranks(self) -> int:
        """Columns beside the weights."""
        return self.whole.shape[1] - self.inputs

    @property
    def forward(self) -> torch.Tensor:
        """[W | s B], (outputs, inputs + ranks)"""
        return self.whole[: self.outputs]

    @property
    def backward(self) -> torch.Tensor:
        """[W ; A], (outputs + ranks, inputs)"""
        return self.whole[:, : self.inputs]

    @property
    def weights(self) -> torch.Tensor:
        """W, (outputs, inputs)"""
        return self.whole[: self.outputs, : self.inputs]

    @property
    def down(self) -> torch.Tensor:
        """A of all adapters, (ranks, inputs)"""
        return self.whole[self.outputs :, : self.inputs]

    @property
    def up(self) -> torch.Tensor:
        """s B of all adapters, (outputs, ranks), zero where an adapter does not add to an output"""
        return self.whole[: self.outputs, self.inputs :]


class Workspace:
    """Buffers that all layers share, one after another on one stream.

    Groups that are needed at once get a slot each; where they follow one another they may share one.
    """

    def __init__(self, operations: ModuleType) -> None:
        self.operations = operations
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._held: dict[str, tuple[Group, Matrix]] = {}

    def forget(self) -> None:
        """A layer begins: what stands in the slots is another's, or from before the optimiser's step."""
        self._held.clear()

    def reserve(self, slot: str, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have room before the first use, so that a slot never grows and leaves a hole behind."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numbers:
            self._held.pop(slot, None)
            self._buffers.pop((slot, dtype), None)
            self._buffers[slot, dtype] = torch.empty(numbers, dtype=dtype, device=device)

    def matrix(self, group: Group, adapters: Sequence[Adapter], slot: str, dtype: torch.dtype) -> Matrix:
        """The group's matrix, filled unless it still stands in its slot."""
        held = self._held.get(slot)
        if held is not None and held[0] is group:
            return held[1]
        ranks = ranks_of(adapters)
        rows, columns = group.outputs + ranks, group.inputs + ranks
        self.reserve(slot, rows * columns, dtype, base_of(group.modules[0]).weight.device)
        whole = self._buffers[slot, dtype][: rows * columns].view(rows, columns)
        group.write(self.operations, whole)
        if adapters:
            laid = [LowRank(own.a, own.b, own.scaling, own.first_output, own.first_rank) for own in adapters]
            self.operations.pack_adapters(laid, whole, group.outputs, group.inputs)
        result = Matrix(whole, group.outputs, group.inputs)
        self._held[slot] = (group, result)
        return result


def _check(name: str, module: torch.nn.Module) -> None:
    if type(module) not in (LoraLinear4bit, LoraLinear, Linear4bit, torch.nn.Linear):
        raise Ineligible(f"{name} is a {type(module).__module__}.{type(module).__qualname__}")
    base = base_of(module)
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


def _active(name: str, module: LoraLayer, output: int, rank: int) -> Adapter | None:
    hooked = bool(module._forward_pre_hooks or module._forward_hooks)
    if hooked:
        raise Ineligible(f"{name} has hooks of somebody else")
    if module.disable_adapters:
        if module.merged:
            raise Ineligible(f"{name}: disabled while merged, so PEFT unmerges it")
        return None
    if module.merged:
        return None
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise Ineligible(f"{name} has {len(active)} active adapters")
    key = active[0]
    variant = module.lora_variant.get(key)
    if variant is not None:
        raise Ineligible(f"{name} has the LoRA variant {type(variant).__name__.removesuffix('LinearVariant')}")
    down, up = module.lora_A[key], module.lora_B[key]
    if down.bias is not None or up.bias is not None:
        raise Ineligible(f"{name}'s adapter has a bias")
    dropout = module.lora_dropout[key]
    share = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
    return Adapter(down.weight, up.weight, float(module.scaling[key]), share, output, rank)
