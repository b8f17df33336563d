"""Where a model's frozen weights are, and how they come into the buffers that are computed with."""

from __future__ import annotations

from typing import Protocol

import torch

from nybble.kernels.operations import Operations
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ProjectionGroup


class WeightStore(Protocol):
    """Fills buffers of the device with weights; the engine's workspace knows no other source of them."""

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """The weights of a group, dequantised, one projection below the other.

        Args:
            group: of one layer.
            out_nk: (outputs, inputs) view on the device, in whose type the weights are written.
        """


class ResidentStore:
    """Weights that are on the device for good, in the bytes that bitsandbytes holds."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """See `WeightStore.write`; one launch for each projection."""
        row = 0
        for weight in group.frozen:
            dequantise(self._operations, weight, out_nk[row : row + weight.outputs])
            row += weight.outputs


def dequantise(operations: Operations, weight: FrozenWeight, out_nk: torch.Tensor) -> None:
    """One weight's numbers, (outputs, inputs), into a view; one that is not quantised is copied."""
    if weight.code is None:
        out_nk.copy_(weight.stored)
    else:
        operations.dequantize(weight.stored, weight.absmax, weight.code, weight.blocksize, weight.nested, out_nk)
