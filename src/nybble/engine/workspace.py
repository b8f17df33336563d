"""Weights and adapters of a group of projections as one matrix.

The weights of a group (query, key and value; output; gate and up; down) are dequantised into a workspace, and the adapters
are placed around them:

    [ W | s B ]      n outputs        so that  y  = [x | T] [W | s B]^T,   T  = x A^T
    [ A |  .  ]      R ranks                   dx = [dy | dT] [W ; A],     dT = dy s B

One product computes base and adapter. Adding s B T afterwards would read and write the output again: 8 to 17% of the
product's time on an H200, against 1% for the added columns (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels.operations import Operations
from nybble.kernels.reference import LowRank
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import Pass, WeightStore


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
        """Version counters of the weights when they were dequantised: load_state_dict writes into them. No counter shows
        what is written through `.data`; calling `nybble.fuse` again reads everything again."""
        self.has_weights = self.has_adapters = False

    def check(self) -> None:
        """A batch starts: the adapters may have changed, and weights that were written into must be dequantised again."""
        before, self.versions = self.versions, [tensor._version for tensor in self.group.stored()]
        self.has_weights = self.has_weights and self.versions == before
        self.has_adapters = False


class Workspace:
    """Buffers that all layers use in turn, and weights that stay dequantised where memory is left.

    Groups that are needed at the same time have separate slots; groups that follow one another may share one.
    """

    def __init__(self, store: WeightStore, operations: Operations, device: torch.device) -> None:
        self.device = device
        self._store = store
        self._operations = operations
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._matrices: dict[tuple[str, torch.dtype, int, int, int], AugmentedMatrix] = {}
        self._current: dict[str, tuple[ProjectionGroup, AugmentedMatrix]] = {}
        self._cached: dict[tuple[int, torch.dtype], CachedMatrix] = {}

    def begin_layer(self, number: int, passing: Pass) -> None:
        """A layer starts: the slots contain another layer's weights, or adapters from before the optimiser's step.

        Args:
            number: the layer's, in the backbone.
            passing: what it is used for.
        """
        self._current.clear()
        self._store.begin_layer(number, passing)

    def cache(self, groups: Sequence[ProjectionGroup], dtype: torch.dtype) -> None:
        """A batch starts: let the weights of these groups stay dequantised, and no others."""
        wanted = {(id(group), dtype): group for group in groups}
        self._cached = {key: cached for key, cached in self._cached.items() if key in wanted}  # frees memory first
        for key, group in wanted.items():
            if key not in self._cached:
                self._cached[key] = CachedMatrix(group, dtype, self.device)
            self._cached[key].check()

    def is_cacheable(self, group: ProjectionGroup) -> bool:
        """Whether its weights may stay dequantised: they are all in 4 bits (copies of others would be no faster), on the device
        (memory that is left should first hold them there), and not inference tensors, which have no version counters."""
        return (
            all(weight.is_quantised for weight in group.frozen)
            and self._store.is_resident(group)
            and not any(tensor.is_inference() for tensor in group.stored())
        )

    def release(self) -> None:
        """Free the weights that stay dequantised."""
        self._cached = {}

    @property
    def cached_bytes(self) -> int:
        """Bytes of the weights that stay dequantised."""
        return sum(cached.matrix.whole.nbytes for cached in self._cached.values())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Another stream uses these buffers now: freed memory is not reused before that stream is done with it."""
        for tensor in [*self._buffers.values(), *(cached.matrix.whole for cached in self._cached.values())]:
            tensor.record_stream(stream)

    def reserve(self, slot: str, numbers: int, dtype: torch.dtype) -> None:
        """Allocate a slot before its first use, so that it never grows, which would fragment memory."""
        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < numbers:
            self._current.clear()
            self._matrices.clear()
            self._buffers.pop((slot, dtype), None)
            with torch.inference_mode(False):  # training may follow
                self._buffers[slot, dtype] = torch.empty(numbers, dtype=dtype, device=self.device)

    def matrix(self, group: ProjectionGroup, slot: str, dtype: torch.dtype) -> AugmentedMatrix:
        """The group's matrix: the cached one, or the one in its reserved slot; filled if necessary."""
        if self._cached:
            cached = self._cached.get((id(group), dtype))
            if cached is not None:
                return self._filled(cached)
        current = self._current.get(slot)
        if current is not None and current[0] is group:
            return current[1]
        key = (slot, dtype, group.outputs, group.inputs, group.ranks)
        result = self._matrices.get(key)  # layers have the same shapes, so their matrices are views of the same buffers
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


def _shape(group: ProjectionGroup) -> tuple[int, int]:
    return group.outputs + group.ranks, group.inputs + group.ranks
