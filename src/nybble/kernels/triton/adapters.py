"""The adapters of a group of projections side by side, cast and scaled, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nybble.kernels.reference import LowRank
from nybble.kernels.triton.launch import Launcher, blocks_of, power_of_two
from nybble.kernels.triton.scaled import magnitudes

ROWS, COLUMNS = 32, 512


@triton.jit
def _pack(
    a0, b0, scaling0, first_output0, outputs0, first_rank0, ranks0,
    a1, b1, scaling1, first_output1, outputs1, first_rank1, ranks1,
    a2, b2, scaling2, first_output2, outputs2, first_rank2, ranks2,
    to_up, up_stride, to_down, down_stride, largest, outputs, inputs, rank, row_blocks,
    TRACK: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < row_blocks:  # s B
        row = (program * ROWS + tl.arange(0, ROWS))[:, None]
        rank_column = tl.arange(0, RANK)[None, :]
        up = _scaled(b0, scaling0, row, rank_column, first_output0, outputs0, first_rank0, ranks0)
        up += _scaled(b1, scaling1, row, rank_column, first_output1, outputs1, first_rank1, ranks1)
        up += _scaled(b2, scaling2, row, rank_column, first_output2, outputs2, first_rank2, ranks2)
        up_address = to_up + row.to(tl.int64) * up_stride + rank_column
        up_numbers = up.to(to_up.dtype.element_ty)
        tl.store(up_address, up_numbers, mask=(row < outputs) & (rank_column < rank))
        if TRACK:
            tl.atomic_max(largest, tl.max(magnitudes(up_numbers.to(tl.float32))))
    else:  # A
        blocks = tl.cdiv(inputs, COLUMNS)
        line = (program - row_blocks) // blocks
        column = ((program - row_blocks) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        down = _line(a0, line, column, inputs, first_rank0, ranks0)
        down += _line(a1, line, column, inputs, first_rank1, ranks1)
        down += _line(a2, line, column, inputs, first_rank2, ranks2)
        down_address = to_down + line.to(tl.int64) * down_stride + column
        down_numbers = down.to(to_down.dtype.element_ty)
        tl.store(down_address, down_numbers, mask=column < inputs)
        if TRACK:
            tl.atomic_max(largest + 1, tl.max(magnitudes(down_numbers.to(tl.float32))))


@triton.jit
def _scaled(b, scaling, row, column, first_output, outputs, first_rank, ranks):
    local_row, local_column = row - first_output, column - first_rank
    inside = (local_row >= 0) & (local_row < outputs) & (local_column >= 0) & (local_column < ranks)
    return tl.load(b + local_row * ranks + local_column, mask=inside, other=0.0).to(tl.float32) * scaling


@triton.jit
def _line(a, line, column, inputs, first_rank, ranks):
    local_row = line - first_rank + tl.zeros_like(column)
    inside = (local_row >= 0) & (local_row < ranks) & (column < inputs)
    return tl.load(a + local_row * inputs + column, mask=inside, other=0.0).to(tl.float32)


_launch = Launcher(_pack, num_warps=4)


def pack_adapters(
    adapters: Sequence[LowRank], up_nr: torch.Tensor, down_rk: torch.Tensor, largest: torch.Tensor | None = None
) -> None:
    """See `reference.pack_adapters`."""
    if largest is not None:
        largest.zero_()
    (outputs, rank), inputs = up_nr.shape, down_rk.shape[1]
    args: list[object] = []
    for index in range(3):
        if index < len(adapters):
            adapter = adapters[index]
            a, b = adapter.a.contiguous(), adapter.b.contiguous()
            args += [a, b, adapter.scaling, adapter.first_output, b.shape[0], adapter.first_rank, a.shape[0]]
        else:
            args += [up_nr, up_nr, 0.0, 0, 0, 0, 0]
    row_blocks = blocks_of(outputs, ROWS)
    _launch(
        (row_blocks + rank * blocks_of(inputs, COLUMNS),), *args, up_nr, up_nr.stride(0), down_rk, down_rk.stride(0),
        up_nr if largest is None else largest, outputs, inputs, rank, row_blocks, largest is not None, power_of_two(rank),
        ROWS, COLUMNS,
    )  # fmt: skip
