"""Rows in e4m3 with their scales, and their products; the other kernels call the functions here to write such rows themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nybble.kernels.scaled import Balance, ScaledRows
from nybble.kernels.triton.launch import Launcher, blocks_of, power_of_two

ROWS, COLUMNS = 64, 64  # of one program of `split`


class RowTarget(NamedTuple):
    """What a kernel gets of where it writes its result."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The result's; values and scales, or the result's again."""
    strides: tuple[int, int]
    """Between rows of the result and of the values."""
    is_scaled: bool


def parts_of(out: torch.Tensor | ScaledRows) -> RowTarget:
    """The arguments for a target."""
    if isinstance(out, ScaledRows):
        return RowTarget((out.wide, out.values, out.scales), (out.wide.stride(0), out.values.stride(0)), True)
    return RowTarget((out, out, out), (out.stride(0), 0), False)


@triton.jit
def magnitudes(numbers):
    """Bits of the magnitudes: they are ordered like these, and what is not a number comes last."""
    return numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """A row's scale, and what its numbers are multiplied with, from the largest of its `magnitudes`.

    The numbers are FEWEST, SPARE, 254 + SPARE and INFINITE of `nybble.kernels.scaled`.
    """
    exponent = tl.maximum(largest >> 23, 27)
    scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    inverse = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    is_finite = (largest >> 23) < 255
    return tl.where(is_finite, scale, float("nan")), tl.where(is_finite, inverse, float("nan"))


@triton.jit
def store_scaled(numbers, values, scales, column, inside):
    """Write one row of float32 in e4m3, and its scale.

    `values` and `scales` point to the row's; `numbers` are zero where they are not `inside`.
    """
    scale, inverse = scale_of(tl.max(magnitudes(numbers)))
    tl.store(scales, scale)
    tl.store(values + column, (numbers * inverse).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _quantize(wide, values, scales, wide_stride, values_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(wide + row * wide_stride + column, mask=inside, other=0.0).to(tl.float32)
    store_scaled(numbers, values + row * values_stride, scales + row, column, inside)


@triton.jit
def _rank_exponent(largest, own, factor, typical):
    """`nybble.kernels.scaled.rank_exponent`, with its LEFT_MOST, RIGHT_MOST and RANGE."""
    right = (tl.load(largest + own) >> 23) - 127 + factor
    left = (tl.load(largest + 1 - own) >> 23) - 127 + typical
    balanced = tl.maximum(tl.minimum((right - left) >> 1, 5 - left), right - 7)
    return tl.minimum(tl.maximum(balanced, -40), 40)


@triton.jit
def _split(
    source, largest, scales, out, row_stride, column_stride, out_stride, rows, ranks, width, own, factor, typical,
    IS_RIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    part, rank = column // ranks, column % ranks
    inside = (row < rows) & (column < 3 * ranks)
    numbers = tl.load(source + row * row_stride + rank * column_stride, mask=inside, other=0.0).to(tl.float32)
    exponent = _rank_exponent(largest, own, factor, typical)
    if IS_RIGHT:
        exponent = factor - exponent
    numbers = numbers * ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    if not IS_RIGHT:
        scale = tl.load(scales + row, mask=row < rows, other=1.0).to(tl.int32, bitcast=True)
        numbers = numbers * ((254 << 23) - scale).to(tl.float32, bitcast=True)  # one over a power of two, exactly
    numbers = tl.clamp(numbers, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    high = numbers.to(out.dtype.element_ty)
    low = (numbers - high.to(tl.float32)).to(out.dtype.element_ty)
    is_low = part == (1 if IS_RIGHT else 2)
    tl.store(out + row * out_stride + column, tl.where(is_low, low, high), mask=(row < rows) & (column < width))


_launch_quantize = {warps: Launcher(_quantize, num_warps=warps) for warps in (1, 2, 4, 8, 16)}
_launch_split = Launcher(_split, num_warps=4)


def quantize_rows(rows: ScaledRows) -> None:
    """See `reference.quantize_rows`."""
    length, width = rows.wide.shape
    block = power_of_two(width)
    _launch_quantize[min(16, max(1, block // 512))](
        (length,), rows.wide, rows.values, rows.scales, rows.wide.stride(0), rows.values.stride(0), width, block
    )


def split(source_mr: torch.Tensor, balance: Balance, scales_m1: torch.Tensor | None, out: torch.Tensor) -> None:
    """See `reference.split`."""
    (length, ranks), width = source_mr.shape, out.shape[1]
    scales = balance.largest if scales_m1 is None else scales_m1
    _launch_split(
        (blocks_of(length, ROWS), blocks_of(width, COLUMNS)), source_mr, balance.largest, scales, out, *source_mr.stride(),
        out.stride(0), length, ranks, width, balance.own, balance.factor, balance.typical, scales_m1 is None, ROWS, COLUMNS,
    )  # fmt: skip


def scaled_product(
    left_mk: torch.Tensor,
    left_scales: torch.Tensor,
    right_nk: torch.Tensor,
    right_scales: torch.Tensor,
    fast: bool,
    out_mn: torch.Tensor,
) -> None:
    """See `reference.scaled_product`; cuBLAS or CUTLASS, as torch chooses."""
    torch._scaled_mm(
        left_mk, right_nk.t(), left_scales, right_scales, out_dtype=out_mn.dtype, use_fast_accum=fast, out=out_mn
    )
