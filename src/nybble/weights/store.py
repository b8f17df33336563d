"""Where a model's frozen weights are stored, and how they are written into the buffers that are computed with."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from nybble.kernels.operations import Operations
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ProjectionGroup

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

    def begin_layer(self, number: int, passing: Pass) -> None:
        """See `WeightStore.begin_layer`; there is nothing to do."""

    def is_resident(self, group: ProjectionGroup) -> bool:
        """See `WeightStore.is_resident`."""
        return True

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
