"""4-bit codes to 16-bit numbers, or to e4m3 and its transpose, in one pass, which also decodes nested scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.reference import Nested
from nybble.kernels.triton.launch import Launcher, blocks_of

TILE_ROWS, TILE_COLUMNS = 128, 128  # of the transpose, which reads 64 bytes of each row and writes 128 of each column
BLOCKS = 64  # quantisation blocks per program; on an H200 64 and 128 read 3.3 TB/s, 16 only 2.6


@triton.jit
def _scale(absmax, nested_code, nested_absmax, offset, block, inside, NESTED: tl.constexpr):
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED > 0:
        scale = tl.load(nested_code + scale.to(tl.int32)) * tl.load(nested_absmax + block // NESTED, mask=inside)
        scale = scale + tl.load(offset)
    return scale


@triton.jit
def _dequantize(
    packed, absmax, code, nested_code, nested_absmax, offset, out, blocks, out_stride, factor,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = _scale(absmax, nested_code, nested_absmax, offset, block, inside, NESTED)
    half: tl.constexpr = BLOCKSIZE // 2
    byte = block.to(tl.int64)[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    values = (tl.interleave(high, low) * factor).to(out.dtype.element_ty)
    first = block.to(tl.int64) * BLOCKSIZE
    row = first // COLUMNS
    start = row * out_stride + (first - row * COLUMNS)
    tl.store(out + start[:, None] + tl.arange(0, BLOCKSIZE)[None, :], values, mask=inside[:, None])


@triton.jit
def _dequantize_transposed(
    packed, absmax, code, nested_code, nested_absmax, offset, out, rows, columns, out_stride, factor,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    start = first + tl.arange(0, COLUMNS // SPAN) * SPAN  # of the parts of a row that have one scale
    inside = (row < rows)[:, None] & (start < columns)[None, :]
    block = (row * (columns // BLOCKSIZE))[:, None] + (start // BLOCKSIZE)[None, :]
    scale = _scale(absmax, nested_code, nested_absmax, offset, block, inside, NESTED)
    byte = (row * (columns // 2))[:, None] + (start // 2)[None, :]
    byte = byte[:, :, None] + tl.arange(0, SPAN // 2)[None, None, :]
    pair = tl.load(packed + byte, mask=inside[:, :, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, :, None]
    low = tl.load(code + (pair & 15)) * scale[:, :, None]
    values = (tl.interleave(high, low) * factor).to(out.dtype.element_ty)
    values = tl.trans(tl.reshape(values, (ROWS, COLUMNS)))
    column = first + tl.arange(0, COLUMNS)
    address = out + column.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(address, values, mask=(column < columns)[:, None] & (row < rows)[None, :])


# enable_fp_fusion off: scale x absmax is rounded before the offset is added, bit for bit as in bitsandbytes.
_launch = Launcher(_dequantize, num_warps=4, enable_fp_fusion=False)
_launch_transposed = Launcher(_dequantize_transposed, num_warps=8, enable_fp_fusion=False)


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    out: torch.Tensor,
) -> None:
    """See `reference.dequantize`."""
    _as_they_are(packed, absmax, code, blocksize, nested, 1.0, out)


def dequantize_e4m3(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    factor: float,
    transposed: bool,
    out: torch.Tensor,
) -> None:
    """See `reference.dequantize_e4m3`."""
    if not transposed:
        _as_they_are(packed, absmax, code, blocksize, nested, factor, out)
        return
    columns, rows = out.shape
    assert columns % blocksize == 0, "a block may not span two rows"
    _launch_transposed(
        (blocks_of(rows, TILE_ROWS), blocks_of(columns, TILE_COLUMNS)), packed, absmax, code, *_inner(code, nested), out,
        rows, columns, out.stride(0), factor, blocksize, nested.blocksize if nested else 0, TILE_ROWS, TILE_COLUMNS,
        min(blocksize, TILE_COLUMNS),
    )  # fmt: skip


def _as_they_are(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    factor: float,
    out: torch.Tensor,
) -> None:
    columns, blocks = out.shape[1], absmax.numel()
    assert columns % blocksize == 0, "a block may not span two rows"
    _launch(
        (blocks_of(blocks, BLOCKS),), packed, absmax, code, *_inner(code, nested), out, blocks, out.stride(0), factor,
        columns, blocksize, nested.blocksize if nested else 0, BLOCKS,
    )  # fmt: skip


def _inner(code: torch.Tensor, nested: Nested | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables of nested scales; anything where there are none."""
    return (nested.code, nested.absmax, nested.offset) if nested else (code, code, code)
