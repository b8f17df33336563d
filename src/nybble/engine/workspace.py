"""Weights and adapters of a group of projections as one matrix.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace and the adapters
laid around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter, where adding s B T afterwards would read and write the output again: 8 to 17% of
the product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nybble.kernels.operations import Operations
from nybble.kernels.reference import LowRank
from nybble.weights.projections import Group


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


class Standing:
    """A group's matrix in memory of its own, which stays from batch to batch."""

    def __init__(self, group: Group, dtype: torch.dtype, device: torch.device) -> None:
        self.group = group
        with torch.inference_mode(False):  # training may follow
            whole = torch.empty(_shape(group), dtype=dtype, device=device)
        self.matrix = Matrix(whole, group.outputs, group.inputs)
        self.versions: list[int] = []
        """Of the weights as they were dequantised: load_state_dict writes into them. What is written through `.data` no
        counter tells; `nybble.fuse` again reads everything anew."""
        self.has_weights = self.has_adapters = False

    def look(self) -> None:
        """A batch begins: the adapters may be others, and weights that were written into are to be dequantised again."""
        before, self.versions = self.versions, [tensor._version for tensor in _tensors(self.group)]
        self.has_weights = self.has_weights and self.versions == before
        self.has_adapters = False


class Workspace:
    """Buffers that all layers share, one after another, and weights that stay where memory is left.

    Groups that are needed at once get a slot each; where they follow one another they may share one.
    """

    def __init__(self, operations: Operations, device: torch.device) -> None:
        self.operations = operations
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype, int, int, int], Matrix] = {}
        self._held: dict[str, tuple[Group, Matrix]] = {}
        self._standing: dict[tuple[int, torch.dtype], Standing] = {}

    def forget(self) -> None:
        """A layer begins: what stands in the slots is another's, or from before the optimiser's step."""
        self._held.clear()

    def keep(self, groups: Sequence[Group], dtype: torch.dtype) -> None:
        """A batch begins: let the weights of these groups stay dequantised, and of no others."""
        wanted = {(id(group), dtype): group for group in groups}
        self._standing = {key: own for key, own in self._standing.items() if key in wanted}  # memory first
        for key, group in wanted.items():
            if key not in self._standing:
                self._standing[key] = Standing(group, dtype, self.device)
            self._standing[key].look()

    def release(self) -> None:
        """Let no weights stay."""
        self._standing = {}

    @property
    def standing_bytes(self) -> int:
        """Of the weights that stay."""
        return sum(own.matrix.whole.nbytes for own in self._standing.values())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Another stream uses what is here now: memory that is let go goes to nobody else before that is over."""
        for tensor in [*self._buffers.values(), *(own.matrix.whole for own in self._standing.values())]:
            tensor.record_stream(stream)

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
        """The group's matrix: as it stays, or in its slot, which `reserve` has made room in; filled where it is not yet."""
        standing = self._standing.get((id(group), dtype))
        if standing is not None:
            if not standing.has_weights:
                self._write_weights(group, standing.matrix.whole)
                standing.has_weights = True
            if not standing.has_adapters:
                self._write_adapters(group, standing.matrix.whole)
                standing.has_adapters = True
            return standing.matrix
        held = self._held.get(slot)
        if held is not None and held[0] is group:
            return held[1]
        key = (slot, dtype, group.outputs, group.inputs, group.ranks)
        result = self._matrices.get(key)  # layers are alike, and so are their matrices
        if result is None:
            rows, columns = _shape(group)
            whole = self._buffers[slot, dtype][: rows * columns].view(rows, columns)
            result = self._matrices[key] = Matrix(whole, group.outputs, group.inputs)
        self._write_weights(group, result.whole)
        self._write_adapters(group, result.whole)
        self._held[slot] = (group, result)
        return result

    def _write_weights(self, group: Group, whole: torch.Tensor) -> None:
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

    def _write_adapters(self, group: Group, whole: torch.Tensor) -> None:
        if group.adapters:
            laid = [
                LowRank(own.a.detach(), own.b.detach(), own.scaling, own.outputs.start, own.ranks.start)
                for own in group.adapters
            ]
            self.operations.pack_adapters(laid, whole, group.outputs, group.inputs)


def may_stand(group: Group) -> bool:
    """Whether its weights are 4-bit ones: copies of others would be no faster, and these nobody computes with in place."""
    return all(frozen.code is not None for frozen in group.frozen) and not any(
        tensor.is_inference() for tensor in _tensors(group)
    )


def _tensors(group: Group) -> Iterator[torch.Tensor]:
    """What its weights are dequantised from."""
    for frozen in group.frozen:
        yield from (frozen.weight, frozen.absmax)
        if frozen.nested is not None:
            yield frozen.nested.absmax


def _shape(group: Group) -> tuple[int, int]:
    return group.outputs + group.ranks, group.inputs + group.ranks
