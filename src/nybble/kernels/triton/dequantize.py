"""4-bit codes to 16-bit numbers in one pass, which also decodes nested scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.reference import Nested
from nybble.kernels.triton.launch import Launcher, blocks_of

BLOCKS = 64  # quantisation blocks per program; on an H200 64 and 128 read 3.3 TB/s, 16 only 2.6


@triton.jit
def _dequantize(
    packed, absmax, code, nested_code, nested_absmax, offset, out, blocks, out_stride,
    COLUMNS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED > 0:
        scale = tl.load(nested_code + scale.to(tl.int32)) * tl.load(nested_absmax + block // NESTED, mask=inside)
        scale = scale + tl.load(offset)
    half: tl.constexpr = BLOCKSIZE // 2
    byte = block.to(tl.int64)[:, None] * half + tl.arange(0, half)[None, :]
    pair = tl.load(packed + byte, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    first = block.to(tl.int64) * BLOCKSIZE
    row = first // COLUMNS
    start = row * out_stride + (first - row * COLUMNS)
    tl.store(out + start[:, None] + tl.arange(0, BLOCKSIZE)[None, :], values, mask=inside[:, None])


# enable_fp_fusion off: scale x absmax is rounded before the offset is added, bit for bit as in bitsandbytes.
_launch = Launcher(_dequantize, num_warps=4, enable_fp_fusion=False)


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    out: torch.Tensor,
) -> None:
    """See `reference.dequantize`."""
    columns, blocks = out.shape[1], absmax.numel()
    assert columns % blocksize == 0, "a block may not span two rows"
    inner = (nested.code, nested.absmax, nested.offset) if nested else (code, code, code)
    _launch(
        (blocks_of(blocks, BLOCKS),), packed, absmax, code, *inner, out, blocks, out.stride(0),
        columns, blocksize, nested.blocksize if nested else 0, BLOCKS,
    )  # fmt: skip
