"""The product seam: what is multiplied for a group of projections, forward and backward, and in which buffers.

The layer function orders the operations and never multiplies. Only this file knows the form of an operand: its width, its types,
and whether x and T = x A^T are side by side. m rows, k inputs, n outputs, R ranks of all adapters of the group.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from nybble.engine.low_rank import AdapterGradients, add_input_gradient, ranks_forward
from nybble.engine.matrices import Augmented, AugmentedMatrix
from nybble.engine.workspace import Workspace
from nybble.kernels.scaled import ScaledRows
from nybble.weights.projections import ProjectionGroup

SavedRanks = dict[tuple[int, int], torch.Tensor]
"""T, (m, R), saved for backward, by group and first row of the tile."""
Buffer = TypeVar("Buffer")


class Product(Protocol[Buffer]):
    """The products of one group in one use of its layer, y = W x + s B A dropout(x), tile by tile.

    A buffer is opaque: it is allocated here, filled through its target by the kernel that computes its content, cut into tiles by
    `buffer[rows]`, and passed back. `rows` are the tile's rows in the batch: dropout masks and saved ranks depend on them.
    """

    group: ProjectionGroup

    def input_buffer(self, length: int) -> Buffer:
        """A buffer for the input x of this many rows."""

    def input_view(self, buffer: Buffer) -> torch.Tensor:
        """The (m, k) view of x, from which the adapters' gradients read it."""

    def input_target(self, buffer: Buffer) -> torch.Tensor | ScaledRows:
        """What the kernel that computes x writes into; `forward` needs it."""

    def input_from(self, x_mk: torch.Tensor) -> Buffer:
        """An input buffer for an existing x: x itself where nothing has to be beside it, otherwise a copy."""

    def gradient_buffer(self, length: int) -> Buffer:
        """A buffer for the outputs' gradient dY of this many rows; until that is known, for the outputs themselves."""

    def gradient_view(self, buffer: Buffer) -> torch.Tensor:
        """The (m, n) view into which `forward` writes the outputs."""

    def gradient_target(self, buffer: Buffer) -> torch.Tensor | ScaledRows:
        """What the kernel that computes dY writes into; `input_gradient` needs it."""

    def gradient_from(self, gradient_mn: torch.Tensor) -> Buffer:
        """As `input_from`, for dY."""

    def forward(
        self,
        buffer: Buffer,
        rows: slice,
        out_mn: torch.Tensor,
        saved: SavedRanks | None,
        add_mn: torch.Tensor | None = None,
    ) -> None:
        """The outputs of a tile.

        Args:
            buffer: from `input_buffer`, with x written into its target, or from `input_from`.
            rows: the tile's.
            out_mn: view for y; where something is added it may be float32.
            saved: holds T, or receives it once it is computed; None where there is no backward.
            add_mn: is added to y, has the type of `out_mn`, and may be `out_mn` itself.
        """

    def input_gradient(self, buffer: Buffer, rows: slice, out_mk: torch.Tensor | None) -> None:
        """The gradient dX of a tile's input, and what the adapters' gradients need of dY.

        Args:
            buffer: from `gradient_buffer`, with dY written into its target, or from `gradient_from`.
            rows: the tile's.
            out_mk: (m, k), or None where nothing before this layer is trained.
        """

    def adapter_gradients(
        self, buffer: Buffer, rows: slice, x_mk: torch.Tensor, saved: SavedRanks, sums: AdapterGradients
    ) -> None:
        """Add the gradients of A and B of a tile to `sums`; T is removed from `saved`, or recomputed.

        Args:
            buffer: as `input_gradient` left it; call that first.
            rows: the tile's.
            x_mk: the forward's input.
            saved: the forward's.
            sums: the sums over the tiles of a batch.
        """


class AugmentedProduct:
    """In bfloat16, float16 or float32: base and adapters in one product of augmented matrices.

    An input buffer is [x | T], (m, k + R), a gradient buffer [dY | dT], (m, n + R), both in the type of the weights;
    y = [x | T] [W | s B]^T and dX = [dY | dT] [W ; A] (`nybble.engine.matrices` says what that saves).
    """

    __slots__ = ("_dtype", "_form", "_index", "_seed", "_slot", "_workspace", "group")

    def __init__(
        self, group: ProjectionGroup, workspace: Workspace, slot: str, dtype: torch.dtype, index: int, seed: int
    ) -> None:
        """
        Args:
            group: frozen weights and adapters.
            workspace: where the group's matrix is.
            slot: the workspace's slot for this group.
            dtype: the type of weights, inputs and outputs.
            index: the group's number in its layer, which has four at most.
            seed: the seed of this use of the layer; it determines every dropout mask.
        """
        self.group = group
        self._workspace = workspace
        self._slot = slot
        self._dtype = dtype
        self._form = Augmented(dtype)
        self._index = index
        self._seed = seed + 4 * index  # a group has three adapters at most

    def input_buffer(self, length: int) -> torch.Tensor:
        return self._empty(length, self.group.inputs + self.group.ranks)

    def input_view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[:, : self.group.inputs]

    def input_target(self, buffer: torch.Tensor) -> torch.Tensor:
        return self.input_view(buffer)

    def input_from(self, x_mk: torch.Tensor) -> torch.Tensor:
        return self._beside_ranks(x_mk)

    def gradient_buffer(self, length: int) -> torch.Tensor:
        return self._empty(length, self.group.outputs + self.group.ranks)

    def gradient_view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[:, : self.group.outputs]

    def gradient_target(self, buffer: torch.Tensor) -> torch.Tensor:
        return self.gradient_view(buffer)

    def gradient_from(self, gradient_mn: torch.Tensor) -> torch.Tensor:
        return self._beside_ranks(gradient_mn)

    def forward(
        self,
        buffer: torch.Tensor,
        rows: slice,
        out_mn: torch.Tensor,
        saved: SavedRanks | None,
        add_mn: torch.Tensor | None = None,
    ) -> None:
        matrix = self._matrix()
        if matrix.ranks:
            self._fill_ranks(buffer, rows, matrix, saved)
        if add_mn is None:
            torch.mm(buffer, matrix.forward, out=out_mn)
        elif out_mn.dtype == self._dtype:
            torch.addmm(add_mn, buffer, matrix.forward, out=out_mn)
        else:  # a float32 residual stream
            torch.add(add_mn, torch.mm(buffer, matrix.forward), out=out_mn)

    def input_gradient(self, buffer: torch.Tensor, rows: slice, out_mk: torch.Tensor | None) -> None:
        matrix = self._matrix()
        gradient = buffer[:, : matrix.outputs]
        if matrix.ranks:
            torch.mm(gradient, matrix.up, out=buffer[:, matrix.outputs :])
        if out_mk is None:
            return
        if not self.group.has_dropout:
            torch.mm(buffer, matrix.backward, out=out_mk)
            return
        torch.mm(gradient, matrix.weights, out=out_mk)
        add_input_gradient(buffer[:, matrix.outputs :], matrix.down, self.group, self._seed_of(rows), out_mk)

    def adapter_gradients(
        self, buffer: torch.Tensor, rows: slice, x_mk: torch.Tensor, saved: SavedRanks, sums: AdapterGradients
    ) -> None:
        group = self.group
        if not group.adapters:
            return
        seed = self._seed_of(rows)
        ranks = saved.pop((self._index, rows.start), None)
        if ranks is None:
            ranks = self._empty(len(x_mk), group.ranks)
            ranks_forward(x_mk, self._matrix().down_transposed, group, seed, ranks)
        sums.add(group, buffer[:, : group.outputs], buffer[:, group.outputs :], x_mk, ranks, seed)

    def _matrix(self) -> AugmentedMatrix:
        """The group's matrix, written into the workspace again if another group has used the slot since."""
        return self._workspace.matrix(self.group, self._slot, self._form)

    def _fill_ranks(self, buffer: torch.Tensor, rows: slice, matrix: AugmentedMatrix, saved: SavedRanks | None) -> None:
        """Write T into the last columns of [x | .]."""
        key, ranks = (self._index, rows.start), buffer[:, matrix.inputs :]
        if saved is not None and key in saved:
            ranks.copy_(saved[key])
            return
        ranks_forward(buffer[:, : matrix.inputs], matrix.down_transposed, self.group, self._seed_of(rows), ranks)
        if saved is not None:
            saved[key] = ranks.clone()

    def _seed_of(self, rows: slice) -> int:
        first: int = rows.start
        return self._seed + 16 * first

    def _beside_ranks(self, matrix: torch.Tensor) -> torch.Tensor:
        """A copy of a matrix with space for the ranks to its right; the matrix itself where there are none."""
        width, ranks = matrix.shape[1], self.group.ranks
        if not ranks and matrix.dtype == self._dtype:
            return matrix
        buffer = self._empty(len(matrix), width + ranks)
        copy_rows(matrix, buffer[:, :width])
        return buffer

    def _empty(self, length: int, width: int) -> torch.Tensor:
        return torch.empty((length, width), dtype=self._dtype, device=self._workspace.device)


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a matrix into a view of its shape, bit for bit where both have the same type.

    Between matrices with different row strides a GPU copies number by number: (8,192, 4,096) of 2 bytes took 97 us on an
    H200, whose bandwidth needs 31. So the rows are copied as complex numbers of 16 bytes, which torch only moves.
    """
    if source.dtype == target.dtype and _is_aligned(source) and _is_aligned(target):
        source, target = source.view(torch.complex128), target.view(torch.complex128)
    target.copy_(source)


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether every row starts and ends at a multiple of 16 bytes, on a device with numbers of 16 bytes."""
    between, within = matrix.stride()
    numbers = matrix.shape[1] | between | int(matrix.storage_offset())
    # The buffer of a caller may start at any address.
    aligned = (numbers * matrix.element_size() | matrix.data_ptr()) % 16 == 0
    return within == 1 and aligned and (matrix.is_cuda or matrix.is_cpu)
