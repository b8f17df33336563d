"""Weights and adapters of a group of projections as one matrix, in the activations' type.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace, and the adapters
are placed around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter. Adding s B T afterwards would read and write the output again: 8 to 17% of the
product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

import dataclasses

import torch

from nybble.engine.workspace import low_rank
from nybble.kernels.operations import Operations
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import WeightStore


class AugmentedMatrix:
    """A group's weights with the adapters around them, in the workspace; valid until the workspace is filled again.

    Attributes:
        forward: [W | s B] transposed, (inputs + ranks, outputs)
        backward: [W ; A], (outputs + ranks, inputs)
        weights: W, (outputs, inputs)
        down: A of all adapters, (ranks, inputs)
        down_transposed: (inputs, ranks)
        up: s B of all adapters, (outputs, ranks), zero where an adapter does not add to an output
    """

    def __init__(self, whole: torch.Tensor, outputs: int, inputs: int) -> None:
        self.outputs = outputs
        self.inputs = inputs
        self.ranks = whole.shape[1] - inputs
        self.forward = whole[:outputs].t()
        self.backward = whole[:, :inputs]
        self.weights = whole[:outputs, :inputs]
        self.down = whole[outputs:, :inputs]
        self.down_transposed = self.down.t()
        self.up = whole[:outputs, inputs:]


@dataclasses.dataclass(frozen=True)
class Augmented:
    """The form of an `AugmentedMatrix` in one type (`nybble.engine.workspace.MatrixForm`)."""

    dtype: torch.dtype

    def place(self, group: ProjectionGroup) -> tuple[int, int]:
        """See `MatrixForm.place`."""
        return 0, (group.outputs + group.ranks) * (group.inputs + group.ranks) * self.dtype.itemsize

    def view(self, part: torch.Tensor, group: ProjectionGroup) -> AugmentedMatrix:
        """See `MatrixForm.view`."""
        rows, columns = group.outputs + group.ranks, group.inputs + group.ranks
        return AugmentedMatrix(part.view(self.dtype).view(rows, columns), group.outputs, group.inputs)

    def write_weights(self, store: WeightStore, group: ProjectionGroup, matrix: AugmentedMatrix) -> None:
        """See `MatrixForm.write_weights`."""
        store.write(group, matrix.weights)

    def write_adapters(self, operations: Operations, group: ProjectionGroup, matrix: AugmentedMatrix) -> None:
        """See `MatrixForm.write_adapters`."""
        if group.adapters:
            operations.pack_adapters(low_rank(group), matrix.up, matrix.down)
