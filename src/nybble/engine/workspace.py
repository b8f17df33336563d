"""Weights and adapters of a group of projections as one matrix.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace and the adapters
laid around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter, where adding s B T afterwards would read and write the output again: 8 to 17% of
the product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

import torch

from nybble.engine.ops import Operations
from nybble.engine.projections import Group
from nybble.engine.reference import LowRank


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

    def __init__(self, operations: Operations, device: torch.device) -> None:
        self.operations = operations
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype, int, int, int], Matrix] = {}
        self._held: dict[str, tuple[Group, Matrix]] = {}

    def forget(self) -> None:
        """A layer begins: what stands in the slots is another's, or from before the optimiser's step."""
        self._held.clear()

    def reserve(self, slot: str, numbers: int, dtype: torch.dtype) -> None:
        """Have room before the first use, so that a slot never grows and leaves a hole behind."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numbers:
            self._held.clear()
            self._matrices.clear()
            self._buffers.pop((slot, dtype), None)
            with torch.inference_mode(False):  # training may follow
                self._buffers[slot, dtype] = torch.empty(numbers, dtype=dtype, device=self.device)

    def matrix(self, group: Group, slot: str, dtype: torch.dtype) -> Matrix:
        """The group's matrix, filled unless it still stands in its slot, which `reserve` has made room in."""
        held = self._held.get(slot)
        if held is not None and held[0] is group:
            return held[1]
        key = (slot, dtype, group.outputs, group.inputs, group.ranks)
        result = self._matrices.get(key)  # layers are alike, and so are their matrices
        if result is None:
            rows, columns = group.outputs + group.ranks, group.inputs + group.ranks
            whole = self._buffers[slot, dtype][: rows * columns].view(rows, columns)
            result = self._matrices[key] = Matrix(whole, group.outputs, group.inputs)
        self._write(group, result.whole)
        self._held[slot] = (group, result)
        return result

    def _write(self, group: Group, whole: torch.Tensor) -> None:
        row = 0
        for frozen in group.frozen:
            out = whole[row : row + frozen.outputs, : group.inputs]
            row += frozen.outputs
            if frozen.code is None:
                out.copy_(frozen.weight)
            else:
                self.operations.dequantize(
                    frozen.weight, frozen.absmax, frozen.code, frozen.blocksize, frozen.nested, out
                )
        if group.adapters:
            laid = [
                LowRank(own.a.detach(), own.b.detach(), own.scaling, own.outputs.start, own.ranks.start)
                for own in group.adapters
            ]
            self.operations.pack_adapters(laid, whole, group.outputs, group.inputs)
