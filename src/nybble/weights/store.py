"""Where a model's frozen weights are stored, and how they are written into the buffers that are computed with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import torch

from nybble.kernels.operations import Operations
from nybble.kernels.scaled import E4M3
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ProjectionGroup

ROUNDED_AT_ONCE = 1024  # rows of a weight that is not quantised, to round without a copy of the whole
Pass = Literal["forward", "backward", "inference"]
"""What a layer is used for: a forward that its backward follows, that backward, or a forward that no backward follows."""


class WeightStore(Protocol):
    """Writes weights into buffers on the device; the engine's workspace gets them nowhere else."""

    def begin_layer(self, number: int, passing: Pass) -> None:
        """A layer starts; until the next one does, only its groups are written.

        Args:
            number: the layer's, in the backbone.
            passing: what it is used for; with the number it tells which layers are next.
        """

    def is_resident(self, group: ProjectionGroup) -> bool:
        """Whether all of the group's weights are on the device."""

    def readable(self, weight: FrozenWeight) -> FrozenWeight:
        """A weight of the current layer as its values can be read on the device."""

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """Write the weights of a group, dequantised, one projection below the other.

        Args:
            group: a group of one layer.
            out_nk: (outputs, inputs) view on the device; the weights are written in its type.
        """

    def write_e4m3(self, group: ProjectionGroup, factor: float, transposed: bool, out: torch.Tensor) -> None:
        """Write the weights of a group in e4m3.

        Args:
            group: a group of one layer.
            factor: a power of two that brings them into e4m3's range.
            transposed: whether to write the transpose, one projection beside the other.
            out: (outputs, inputs) view on the device; (inputs, outputs) for the transpose.
        """


class ResidentStore:
    """Weights that stay on the device, in the form that bitsandbytes stores them."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def begin_layer(self, number: int, passing: Pass) -> None:
        """See `WeightStore.begin_layer`; there is nothing to do."""

    def is_resident(self, group: ProjectionGroup) -> bool:
        """See `WeightStore.is_resident`."""
        return True

    def readable(self, weight: FrozenWeight) -> FrozenWeight:
        """See `WeightStore.readable`."""
        return weight

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """See `WeightStore.write`; one kernel launch per projection."""
        dequantise_all(self._operations, group.frozen, out_nk)

    def write_e4m3(self, group: ProjectionGroup, factor: float, transposed: bool, out: torch.Tensor) -> None:
        """See `WeightStore.write_e4m3`; one kernel launch per projection."""
        dequantise_all_e4m3(self._operations, group.frozen, factor, transposed, out)


def dequantise_all(operations: Operations, weights: Iterable[FrozenWeight], out_nk: torch.Tensor) -> None:
    """Write weights one below the other into a view."""
    row = 0
    for weight in weights:
        dequantise(operations, weight, out_nk[row : row + weight.outputs])
        row += weight.outputs


def dequantise_all_e4m3(
    operations: Operations, weights: Iterable[FrozenWeight], factor: float, transposed: bool, out: torch.Tensor
) -> None:
    """Write weights times a factor in e4m3 into a view, one below the other, or beside it where they are transposed."""
    start = 0
    for weight in weights:
        places = slice(start, start + weight.outputs)
        dequantise_e4m3(operations, weight, factor, transposed, out[:, places] if transposed else out[places])
        start = places.stop


def dequantise(operations: Operations, weight: FrozenWeight, out_nk: torch.Tensor) -> None:
    """Write a weight, (outputs, inputs), into a view; one that is not quantised is copied."""
    if weight.code is None:
        out_nk.copy_(weight.stored)
    else:
        operations.dequantize(weight.stored, weight.absmax, weight.code, weight.blocksize, weight.nested, out_nk)


def dequantise_e4m3(
    operations: Operations, weight: FrozenWeight, factor: float, transposed: bool, out: torch.Tensor
) -> None:
    """Write a weight times a factor in e4m3 into a view; one that is not quantised is rounded."""
    if weight.code is None:
        for start in range(0, weight.outputs, ROUNDED_AT_ONCE):
            rows = slice(start, start + ROUNDED_AT_ONCE)
            values = (weight.stored[rows] * factor).to(E4M3)
            (out[:, rows] if transposed else out[rows]).copy_(values.t() if transposed else values)
    else:
        parts = weight.stored, weight.absmax, weight.code, weight.blocksize, weight.nested
        operations.dequantize_e4m3(*parts, factor, transposed, out)
