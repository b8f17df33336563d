"""Weights and adapters of a group of projections as one matrix.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace and the adapters
laid around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter, where adding s B T afterwards would read and write the output again: 8 to 17% of
the product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels.operations import Operations
from nybble.kernels.reference import LowRank
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import WeightStore


class AugmentedMatrix:
    """A group's weights with the adapters around them, in the workspace; good until the workspace is filled anew.

    Attributes:
        forward: [W | s B] transposed, (inputs + ranks, outputs)
        backward: [W ; A], (outputs + ranks, inputs)
        weights: W, (outputs, inputs)
        down: A of all adapters, (ranks, inputs)
        down_transposed: (inputs, ranks)
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


class CachedMatrix:
    """A group's matrix in memory of its own, which stays dequantised from batch to batch."""

    def __init__(self, group: ProjectionGroup, dtype: torch.dtype, device: torch.device) -> None:
        self.group = group
        with torch.inference_mode(False):  # training may follow
            whole = torch.empty(_shape(group), dtype=dtype, device=device)
        self.matrix = AugmentedMatrix(whole, group.outputs, group.inputs)
        self.versions: list[int] = []
        """Of the weights as they were dequantised: load_state_dict writes into them. What is written through `.data` no
        counter tells; `nybble.fuse` again reads everything anew."""
        self.has_weights = self.has_adapters = False

    def check(self) -> None:
        """A batch begins: the adapters may be others, and weights that were written into are to be dequantised again."""
        before, self.versions = self.versions, [tensor._version for tensor in self.group.stored()]
        self.has_weights = self.has_weights and self.versions == before
        self.has_adapters = False


class Workspace:
    """Buffers that all layers share, one after another, and weights that stay dequantised where memory is left.

    Groups that are needed at once get a slot each; where they follow one another they may share one.
    """

    def __init__(self, store: WeightStore, operations: Operations, device: torch.device) -> None:
        self.device = device
        self._store = store
        self._operations = operations
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype, int, int, int], AugmentedMatrix] = {}
        self._current: dict[str, tuple[ProjectionGroup, AugmentedMatrix]] = {}
        self._cached: dict[tuple[int, torch.dtype], CachedMatrix] = {}

    def forget(self) -> None:
        """A layer begins: what is in the slots is another's, or from before the optimiser's step."""
        self._current.clear()

    def cache(self, groups: Sequence[ProjectionGroup], dtype: torch.dtype) -> None:
        """A batch begins: let the weights of these groups stay dequantised, and of no others."""
        wanted = {(id(group), dtype): group for group in groups}
        self._cached = {key: cached for key, cached in self._cached.items() if key in wanted}  # memory first
        for key, group in wanted.items():
            if key not in self._cached:
                self._cached[key] = CachedMatrix(group, dtype, self.device)
            self._cached[key].check()

    def release(self) -> None:
        """Let no weights stay dequantised."""
        self._cached = {}

    @property
    def cached_bytes(self) -> int:
        """Of the weights that stay dequantised."""
        return sum(cached.matrix.whole.nbytes for cached in self._cached.values())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Another stream uses what is here now: memory that is let go goes to nobody else before that is over."""
        for tensor in [*self._buffers.values(), *(cached.matrix.whole for cached in self._cached.values())]:
            tensor.record_stream(stream)

    def reserve(self, slot: str, numbers: int, dtype: torch.dtype) -> None:
        """Allocate a slot before its first use, so that it never grows and leaves a hole behind."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numbers:
            self._current.clear()
            self._matrices.clear()
            self._buffers.pop((slot, dtype), None)
            with torch.inference_mode(False):  # training may follow
                self._buffers[slot, dtype] = torch.empty(numbers, dtype=dtype, device=self.device)

    def matrix(self, group: ProjectionGroup, slot: str, dtype: torch.dtype) -> AugmentedMatrix:
        """The group's matrix: as it is cached, or in its slot, which was reserved; filled where it is not yet."""
        if self._cached:
            cached = self._cached.get((id(group), dtype))
            if cached is not None:
                return self._filled(cached)
        current = self._current.get(slot)
        if current is not None and current[0] is group:
            return current[1]
        key = (slot, dtype, group.outputs, group.inputs, group.ranks)
        result = self._matrices.get(key)  # layers are alike, and so are their matrices
        if result is None:
            rows, columns = _shape(group)
            whole = self._buffers[slot, dtype][: rows * columns].view(rows, columns)
            result = self._matrices[key] = AugmentedMatrix(whole, group.outputs, group.inputs)
        self._store.write(group, result.weights)
        self._write_adapters(group, result.whole)
        self._current[slot] = (group, result)
        return result

    def _filled(self, cached: CachedMatrix) -> AugmentedMatrix:
        if not cached.has_weights:
            self._store.write(cached.group, cached.matrix.weights)
            cached.has_weights = True
        if not cached.has_adapters:
            self._write_adapters(cached.group, cached.matrix.whole)
            cached.has_adapters = True
        return cached.matrix

    def _write_adapters(self, group: ProjectionGroup, whole: torch.Tensor) -> None:
        if group.adapters:
            low_rank = [
                LowRank(
                    adapter.a.detach(), adapter.b.detach(), adapter.scaling, adapter.outputs.start, adapter.ranks.start
                )
                for adapter in group.adapters
            ]
            self._operations.pack_adapters(low_rank, whole, group.outputs, group.inputs)


def is_cacheable(group: ProjectionGroup) -> bool:
    """Whether its weights are 4-bit ones: copies of others would be no faster, and these nobody computes with in place."""
    return all(weight.is_quantised for weight in group.frozen) and not any(
        tensor.is_inference() for tensor in group.stored()
    )


def _shape(group: ProjectionGroup) -> tuple[int, int]:
    return group.outputs + group.ranks, group.inputs + group.ranks
