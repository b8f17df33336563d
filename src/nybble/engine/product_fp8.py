"""Products in fp8: a frozen 4-bit base feeds the fp8 matrix units of Ada, Hopper and Blackwell cards directly.

**Formats.** The units multiply e4m3 (four bits of exponent, three of mantissa: -448 to 448, relative error 2^-4 at most) and
sum in float32. Weights are written from NF4 to e4m3 without a 16-bit copy in between, times one power of two for a group, which
brings its largest magnitude to between 128 and 256. Inputs and output gradients have a power of two for each row, found by the
kernel that computes the row (`nybble.kernels.scaled`). Norms, attention, the head, the residual stream and all that is kept for
backward stay in bfloat16, and so do T = x A^T, dT = dY s B and the adapters' gradients, which read the rows before they were
rounded.

**Layout.** The units want both operands with the summed dimension last, so a group has two matrices in a slot, each one byte a
number, together 2.5% more bytes than the one 16-bit matrix of `nybble.engine.matrices`:

    forward    [ W   | high sB  | low sB  | high sB  ]  n rows     y  = [x  | high T  | high T  | low T ]  forward^T
    backward   [ W^T | high A^T | low A^T | high A^T ]  k rows     dX = [dY | high dT | high dT | low dT] backward^T

In plain e4m3 a new s B would change only every so many steps of the optimiser. In three columns for each rank (`split`), with a
power of two that both operands share (`Balance`), the adapters' part of a product is off by 0.1 to 0.2% where the root mean
square of s B is a ten-thousandth of the largest weight or more, about as in bfloat16, and by 0.8 to 1.6% where it is a
millionth. Adding s B T in a pass of its own would read and write the output again, a larger share of the time than in 16 bits.

**Trade-offs.** e4m3 of the weights adds an error of 2.6% to a product, that of the inputs 2.2 to 2.7%, where NF4 itself has
9.2%: all together 9.7 to 9.9% (simulated). The library's way, one scale a tensor or a block and 16-bit weights quantised once,
has no 4-bit base. Sums may be fast (with fewer bits than float32: about 14 on Hopper, DeepSeek-AI 2024) or slow. They are fast
unless asked otherwise: slow ones in backward, where a gradient passes through every layer below, cost 6% of a step (H200) and
made adapters no better (bench/quality_fp8.py).

The adapter that is trained is an ordinary one: in evaluation mode without gradients, layers are computed in 16 bits.
"""

from __future__ import annotations

import dataclasses
import math
import weakref

import torch

from nybble.engine.low_rank import AdapterGradients, add_input_gradient, ranks_forward
from nybble.engine.product import SavedRanks
from nybble.engine.workspace import Workspace, low_rank
from nybble.kernels.operations import Operations
from nybble.kernels.scaled import E4M3, Balance, ScaledRows
from nybble.plan.ledger import SCALED_ALIGNMENT, split_columns
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import WeightStore

WEIGHT_EXPONENT = 8  # weights end below 2^8, of e4m3's 448; NF4's smallest number is 2^-4 of its block's largest


class Peaks:
    """The exponent of each group's weights, read once: reading it from the device waits for what is computed there.

    Args:
        store: of the weights; a group's exponent may be asked for while its layer is computed.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._known: dict[int, tuple[weakref.ref[ProjectionGroup], list[int], int | None]] = {}

    def exponent(self, group: ProjectionGroup) -> int | None:
        """Of what a group's weights are multiplied with; None if a weight is not finite."""
        versions = [0 if tensor.is_inference() else tensor._version for tensor in group.stored()]
        known = self._known.get(id(group))
        if known is None or known[0]() is not group or known[1] != versions:
            largest = torch.stack([self._store.readable(weight).largest() for weight in group.frozen]).amax().item()
            exponent = WEIGHT_EXPONENT - math.frexp(largest)[1] if math.isfinite(largest) else None
            known = weakref.ref(group), versions, exponent
            self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
            self._known[id(group)] = known
        return known[2]


@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """A group's weights and adapters for one direction, in the workspace; valid until its part is filled again."""

    values: torch.Tensor
    """[W | s B] or [W^T | A^T], (rows, summed + 3 ranks rounded up), e4m3."""
    scales: torch.Tensor
    """(1, rows) float32, all the same."""
    up: torch.Tensor
    """s B of all adapters, (outputs, ranks), in the activations' type."""
    down: torch.Tensor
    """A of all adapters, (ranks, inputs)."""
    largest: torch.Tensor
    """(2,) int32: bits of the largest magnitudes of both."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The form of a `ScaledMatrix` (`nybble.engine.workspace.MatrixForm`)."""

    dtype: torch.dtype
    """Of the adapters beside it."""
    transposed: bool
    """Whether it is for backward."""
    peaks: Peaks = dataclasses.field(compare=False)

    def place(self, group: ProjectionGroup) -> tuple[int, int]:
        """See `MatrixForm.place`: backward's lies behind forward's."""
        size = sum(self._sizes(group))
        if not self.transposed:
            return 0, size
        return sum(dataclasses.replace(self, transposed=False)._sizes(group)), size

    def view(self, part: torch.Tensor, group: ProjectionGroup) -> ScaledMatrix:
        """See `MatrixForm.view`."""
        rows, summed = self._shape(group)
        values, scales, up, down, last = part.split(self._sizes(group))
        largest = last[:8].view(torch.int32)
        return ScaledMatrix(
            values[: rows * _width(summed, group)].view(E4M3).view(rows, -1),
            scales[: 4 * rows].view(torch.float32).view(1, rows),
            up[: self._bytes(group.outputs * group.ranks)].view(self.dtype).view(group.outputs, group.ranks),
            down[: self._bytes(group.inputs * group.ranks)].view(self.dtype).view(group.ranks, group.inputs),
            largest,
        )

    def balance(self, group: ProjectionGroup, matrix: ScaledMatrix) -> Balance:
        """How T and s B, or dT and A^T, are divided."""
        typical = round(math.log2(180 / 7 * self._shape(group)[1] ** 0.5))
        return Balance(matrix.largest, int(self.transposed), self.peaks.exponent(group) or 0, typical)

    def write_weights(self, store: WeightStore, group: ProjectionGroup, matrix: ScaledMatrix) -> None:
        """See `MatrixForm.write_weights`."""
        exponent = self.peaks.exponent(group)
        # The units would saturate at 448 where 16 bits show infinity, so all of a group with such a weight becomes NaN.
        factor = math.nan if exponent is None else 2.0**exponent
        matrix.scales.fill_(1 / factor)
        store.write_e4m3(group, factor, self.transposed, matrix.values[:, : self._shape(group)[1]])

    def write_adapters(self, operations: Operations, group: ProjectionGroup, matrix: ScaledMatrix) -> None:
        """See `MatrixForm.write_adapters`."""
        if not group.adapters:
            return
        operations.pack_adapters(low_rank(group), matrix.up, matrix.down, matrix.largest)
        source = matrix.down.t() if self.transposed else matrix.up
        operations.split(source, self.balance(group, matrix), None, matrix.values[:, self._shape(group)[1] :])

    def _shape(self, group: ProjectionGroup) -> tuple[int, int]:
        """Rows, and the length of the summed dimension."""
        return (group.inputs, group.outputs) if self.transposed else (group.outputs, group.inputs)

    def _sizes(self, group: ProjectionGroup) -> list[int]:
        """Bytes of the parts, each a multiple of SCALED_ALIGNMENT."""
        rows, summed = self._shape(group)
        parts = (rows * _width(summed, group), 4 * rows, self._bytes(group.outputs * group.ranks),
                 self._bytes(group.inputs * group.ranks), 8)  # fmt: skip
        return [-(-part // SCALED_ALIGNMENT) * SCALED_ALIGNMENT for part in parts]

    def _bytes(self, numbers: int) -> int:
        return numbers * self.dtype.itemsize


def _width(summed: int, group: ProjectionGroup) -> int:
    """Columns of an operand: the summed dimension and the split ranks."""
    return summed + split_columns(group.ranks)


class Fp8Buffer:
    """Rows of a product's input or of its output gradient; in e4m3 too once their kernel is about to compute them."""

    __slots__ = ("ranks", "scaled", "wide")

    def __init__(self, wide: torch.Tensor) -> None:
        self.wide = wide
        self.scaled: ScaledRows | None = None
        self.ranks: torch.Tensor | None = None
        """dT, after `input_gradient`."""

    def __getitem__(self, rows: slice) -> Fp8Buffer:
        return Fp8Buffer(self.wide[rows])


class Fp8Product:
    """Base and adapters in one product of e4m3 matrices, as the head of this file says."""

    __slots__ = (
        "_backward",
        "_dtype",
        "_fast",
        "_forward",
        "_index",
        "_operations",
        "_seed",
        "_slot",
        "_workspace",
        "group",
    )

    def __init__(
        self,
        group: ProjectionGroup,
        workspace: Workspace,
        operations: Operations,
        slot: str,
        dtype: torch.dtype,
        index: int,
        seed: int,
        *,
        peaks: Peaks,
        fast: tuple[bool, bool],
    ) -> None:
        """
        Args:
            group: see `nybble.engine.product.AugmentedProduct`.
            workspace: see there.
            operations: what quantises and multiplies.
            slot: see there.
            dtype: the type of inputs and outputs.
            index: see there.
            seed: see there.
            peaks: of the weights.
            fast: whether the sums are fast, forward and backward.
        """
        self.group = group
        self._workspace = workspace
        self._operations = operations
        self._slot = slot
        self._dtype = dtype
        self._index = index
        self._seed = seed + 4 * index  # a group has three adapters at most
        self._fast = fast
        self._forward = Scaled(dtype, False, peaks)
        self._backward = Scaled(dtype, True, peaks)

    def input_buffer(self, length: int) -> Fp8Buffer:
        return Fp8Buffer(self._empty(length, self.group.inputs))

    def input_view(self, buffer: Fp8Buffer) -> torch.Tensor:
        return buffer.wide

    def input_target(self, buffer: Fp8Buffer) -> ScaledRows:
        return self._target(buffer)

    def input_from(self, x_mk: torch.Tensor) -> Fp8Buffer:
        return self._quantised(x_mk)

    def gradient_buffer(self, length: int) -> Fp8Buffer:
        return Fp8Buffer(self._empty(length, self.group.outputs))

    def gradient_view(self, buffer: Fp8Buffer) -> torch.Tensor:
        return buffer.wide

    def gradient_target(self, buffer: Fp8Buffer) -> ScaledRows:
        return self._target(buffer)

    def gradient_from(self, gradient_mn: torch.Tensor) -> Fp8Buffer:
        return self._quantised(gradient_mn)

    def forward(
        self,
        buffer: Fp8Buffer,
        rows: slice,
        out_mn: torch.Tensor,
        saved: SavedRanks | None,
        add_mn: torch.Tensor | None = None,
    ) -> None:
        scaled, matrix = buffer.scaled, self._workspace.matrix(self.group, self._slot, self._forward)
        assert scaled is not None, "nothing was written"
        if self.group.ranks:
            self._split(
                self._ranks(buffer.wide, rows, matrix, saved), scaled, self._forward.balance(self.group, matrix)
            )
        target = out_mn if add_mn is None else self._empty(len(out_mn), self.group.outputs)
        self._operations.scaled_product(
            scaled.values, scaled.scales, matrix.values, matrix.scales, self._fast[0], target
        )
        if add_mn is not None:
            torch.add(add_mn, target, out=out_mn)

    def input_gradient(self, buffer: Fp8Buffer, rows: slice, out_mk: torch.Tensor | None) -> None:
        matrix = self._workspace.matrix(self.group, self._slot, self._backward)
        scaled, buffer.scaled = buffer.scaled, None
        if self.group.ranks:
            buffer.ranks = buffer.wide @ matrix.up
        if out_mk is None:
            return
        assert scaled is not None, "nothing was written"
        if buffer.ranks is not None and not self.group.has_dropout:
            self._split(buffer.ranks, scaled, self._backward.balance(self.group, matrix))
        elif buffer.ranks is not None:  # the adapters' part is added below
            scaled.values.view(torch.uint8)[:, self.group.outputs :] = 0
        self._operations.scaled_product(
            scaled.values, scaled.scales, matrix.values, matrix.scales, self._fast[1], out_mk
        )
        if buffer.ranks is not None and self.group.has_dropout:
            add_input_gradient(buffer.ranks, matrix.down, self.group, self._seed_of(rows), out_mk)

    def adapter_gradients(
        self, buffer: Fp8Buffer, rows: slice, x_mk: torch.Tensor, saved: SavedRanks, sums: AdapterGradients
    ) -> None:
        if not self.group.adapters:
            return
        assert buffer.ranks is not None, "input_gradient comes first"
        ranks = saved.pop((self._index, rows.start), None)
        if ranks is None:
            matrix = self._workspace.matrix(self.group, self._slot, self._backward)
            ranks = self._new_ranks(x_mk, rows, matrix)
        sums.add(self.group, buffer.wide, buffer.ranks, x_mk, ranks, self._seed_of(rows))

    def _ranks(self, x_mk: torch.Tensor, rows: slice, matrix: ScaledMatrix, saved: SavedRanks | None) -> torch.Tensor:
        """T, the saved one if there is one, otherwise computed and saved."""
        key = (self._index, rows.start)
        ranks = None if saved is None else saved.get(key)
        if ranks is None:
            ranks = self._new_ranks(x_mk, rows, matrix)
            if saved is not None:
                saved[key] = ranks
        return ranks

    def _new_ranks(self, x_mk: torch.Tensor, rows: slice, matrix: ScaledMatrix) -> torch.Tensor:
        ranks = self._empty(len(x_mk), self.group.ranks)
        ranks_forward(x_mk, matrix.down.t(), self.group, self._seed_of(rows), ranks)
        return ranks

    def _split(self, ranks: torch.Tensor, scaled: ScaledRows, balance: Balance) -> None:
        """Write T or dT beside the rows, in their scales."""
        self._operations.split(ranks, balance, scaled.scales, scaled.values[:, scaled.wide.shape[1] :])

    def _target(self, buffer: Fp8Buffer) -> ScaledRows:
        """Where the kernel that computes the rows writes them: allocated only now, for kept rows wait long for it."""
        length, width = buffer.wide.shape
        values = torch.empty((length, _width(width, self.group)), dtype=E4M3, device=buffer.wide.device)
        scales = torch.empty((length, 1), device=buffer.wide.device)
        buffer.scaled = ScaledRows(buffer.wide, values, scales)
        return buffer.scaled

    def _quantised(self, matrix: torch.Tensor) -> Fp8Buffer:
        """Rows that exist already."""
        buffer = Fp8Buffer(matrix if matrix.dtype == self._dtype else matrix.to(self._dtype))
        self._operations.quantize_rows(self._target(buffer))
        return buffer

    def _seed_of(self, rows: slice) -> int:
        first: int = rows.start
        return self._seed + 16 * first

    def _empty(self, length: int, width: int) -> torch.Tensor:
        return torch.empty((length, width), dtype=self._dtype, device=self._workspace.device)
