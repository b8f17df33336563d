"""Where a model's frozen weights are stored, and how they are written into the buffers that are computed with."""

from __future__ import annotations

from typing import Protocol

import torch

from nybble.kernels.operations import Operations
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ProjectionGroup


class WeightStore(Protocol):
    """Writes weights into buffers on the device; the engine's workspace gets them nowhere else."""

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """Write the weights of a group, dequantised, one projection below the other.

        Args:
            group: a group of one layer.
            out_nk: (outputs, inputs) view on the device; the weights are written in its type.
        """


class ResidentStore:
    """Weights that stay on the device, in the form that bitsandbytes stores them."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """See `WeightStore.write`; one kernel launch per projection."""
        row = 0
        for weight in group.frozen:
            dequantise(self._operations, weight, out_nk[row : row + weight.outputs])
            row += weight.outputs


def dequantise(operations: Operations, weight: FrozenWeight, out_nk: torch.Tensor) -> None:
    """Write a weight, (outputs, inputs), into a view; one that is not quantised is copied."""
    if weight.code is None:
        out_nk.copy_(weight.stored)
    else:
        operations.dequantize(weight.stored, weight.absmax, weight.code, weight.blocksize, weight.nested, out_nk)
