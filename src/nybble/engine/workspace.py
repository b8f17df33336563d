"""The memory into which weights are dequantised: buffers that all layers use in turn, and copies where memory is left.

What is written for a group of projections is its form's affair (`nybble.engine.matrices`, `nybble.engine.product_fp8`); this file
decides where, and when it must be written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from nybble.kernels.operations import Operations
from nybble.kernels.reference import LowRank
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import Pass, WeightStore

Matrix = TypeVar("Matrix")


class MatrixForm(Protocol[Matrix]):
    """How a group's weights and adapters are laid out for a product. Equal forms have equal hashes."""

    def place(self, group: ProjectionGroup) -> tuple[int, int]:
        """First byte in the group's slot, and number of bytes: forms that are needed at the same time lie side by side."""

    def view(self, part: torch.Tensor, group: ProjectionGroup) -> Matrix:
        """The matrix in this many bytes."""

    def write_weights(self, store: WeightStore, group: ProjectionGroup, matrix: Matrix) -> None:
        """Write the frozen weights."""

    def write_adapters(self, operations: Operations, group: ProjectionGroup, matrix: Matrix) -> None:
        """Write the adapters, which change from step to step."""


class CachedMatrix:
    """A group's matrix in memory of its own, which stays dequantised from batch to batch."""

    def __init__(self, group: ProjectionGroup, form: MatrixForm[Any], device: torch.device) -> None:
        self.group = group
        self.form = form
        with torch.inference_mode(False):  # training may follow
            self.bytes = torch.empty(form.place(group)[1], dtype=torch.uint8, device=device)
            self.matrix = form.view(self.bytes, group)
        self.versions: list[int] = []
        """Version counters of the weights when they were dequantised: load_state_dict writes into them. No counter shows
        what is written through `.data`; calling `nybble.fuse` again reads everything again."""
        self.has_weights = self.has_adapters = False

    def check(self) -> None:
        """A batch starts: the adapters may have changed, and weights that were written into must be dequantised again."""
        before, self.versions = self.versions, [tensor._version for tensor in self.group.stored()]
        self.has_weights = self.has_weights and self.versions == before
        self.has_adapters = False


class Content(NamedTuple):
    """What is in a part of a slot now."""

    start: int
    stop: int
    group: ProjectionGroup
    form: MatrixForm[Any]
    matrix: Any


class Workspace:
    """Buffers that all layers use in turn, and weights that stay dequantised where memory is left.

    Groups that are needed at the same time have separate slots; groups that follow one another may share one.
    """

    def __init__(self, store: WeightStore, operations: Operations, device: torch.device) -> None:
        self.device = device
        self._store = store
        self._operations = operations
        self._buffers: dict[str, torch.Tensor] = {}
        self._matrices: dict[tuple[str, MatrixForm[Any], int, int, int], Any] = {}
        self._current: dict[str, list[Content]] = {}
        self._cached: dict[tuple[int, MatrixForm[Any]], CachedMatrix] = {}

    def begin_layer(self, number: int, passing: Pass) -> None:
        """A layer starts: the slots contain another layer's weights, or adapters from before the optimiser's step.

        Args:
            number: the layer's, in the backbone.
            passing: what it is used for.
        """
        self._current.clear()
        self._store.begin_layer(number, passing)

    def cache(self, wanted: Sequence[tuple[ProjectionGroup, MatrixForm[Any]]]) -> None:
        """A batch starts: let the weights of these groups stay dequantised in these forms, and no others."""
        by_key = {(id(group), form): (group, form) for group, form in wanted}
        self._cached = {key: cached for key, cached in self._cached.items() if key in by_key}  # frees memory first
        for key, (group, form) in by_key.items():
            if key not in self._cached:
                self._cached[key] = CachedMatrix(group, form, self.device)
        self.check()

    def check(self) -> None:
        """A batch starts: what stays dequantised may have changed."""
        for cached in self._cached.values():
            cached.check()

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
        return sum(cached.bytes.nbytes for cached in self._cached.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the slots."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Another stream uses these buffers now: freed memory is not reused before that stream is done with it."""
        for tensor in [*self._buffers.values(), *(cached.bytes for cached in self._cached.values())]:
            tensor.record_stream(stream)

    def reserve(self, slot: str, size: int) -> None:
        """Allocate a slot's bytes before its first use, so that it never grows, which would fragment memory."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.nbytes < size:
            self._current.clear()
            self._matrices.clear()
            self._buffers.pop(slot, None)
            with torch.inference_mode(False):  # training may follow
                self._buffers[slot] = torch.empty(size, dtype=torch.uint8, device=self.device)

    def matrix(self, group: ProjectionGroup, slot: str, form: MatrixForm[Matrix]) -> Matrix:
        """The group's matrix: the cached one, or the one in its reserved slot; filled if necessary."""
        if self._cached:
            cached = self._cached.get((id(group), form))
            if cached is not None:
                matrix: Matrix = self._filled(cached)
                return matrix
        current = self._current.setdefault(slot, [])
        for content in current:
            if content.group is group and content.form == form:
                found: Matrix = content.matrix
                return found
        start, size = form.place(group)
        result = self._view(group, slot, form, start, size)
        form.write_weights(self._store, group, result)
        form.write_adapters(self._operations, group, result)
        current[:] = [content for content in current if content.stop <= start or content.start >= start + size]
        current.append(Content(start, start + size, group, form, result))
        return result

    def _view(self, group: ProjectionGroup, slot: str, form: MatrixForm[Matrix], start: int, size: int) -> Matrix:
        """Layers have the same shapes, so their matrices are the same views of the buffers."""
        key = (slot, form, group.outputs, group.inputs, group.ranks)
        result: Matrix | None = self._matrices.get(key)
        if result is None:
            with torch.inference_mode(False):  # training may follow
                result = self._matrices[key] = form.view(self._buffers[slot][start : start + size], group)
        return result

    def _filled(self, cached: CachedMatrix) -> Any:
        if not cached.has_weights:
            cached.form.write_weights(self._store, cached.group, cached.matrix)
            cached.has_weights = True
        if not cached.has_adapters:
            cached.form.write_adapters(self._operations, cached.group, cached.matrix)
            cached.has_adapters = True
        return cached.matrix


def low_rank(group: ProjectionGroup) -> list[LowRank]:
    """A group's adapters as the operations take them."""
    return [
        LowRank(adapter.a.detach(), adapter.b.detach(), adapter.scaling, adapter.outputs.start, adapter.ranks.start)
        for adapter in group.adapters
    ]
