"""RMSNorm, with the residual add before it or without, and its backward, with the residual's gradient added or without."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.scaled import ScaledRows
from nybble.kernels.triton.launch import Launcher, power_of_two
from nybble.kernels.triton.scaled import parts_of, store_scaled


@triton.jit
def _forward(
    x, update, weight, total, out, values, scales, x_stride, update_stride, total_stride, out_stride, values_stride,
    hidden, eps, ADD: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + row * update_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * total_stride + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = (value * inverse * scale).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, result, mask=inside)
    if SCALED:
        store_scaled(result.to(tl.float32), values + row * values_stride, scales + row, column, inside)


@triton.jit
def _backward(
    gradient, x, weight, residual, out, values, scales, gradient_stride, x_stride, residual_stride, out_stride,
    values_stride, hidden, eps, ADD: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(gradient + row * gradient_stride + column, mask=inside, other=0.0).to(tl.float32)
    inner *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / hidden + eps)
    normed = value * inverse
    mean = tl.sum(inner * normed) / hidden
    result = inverse * (inner - normed * mean)
    if ADD:
        result += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, rounded, mask=inside)
    if SCALED:
        store_scaled(rounded.to(tl.float32), values + row * values_stride, scales + row, column, inside)


# 16 numbers per thread: two loads of 16 bytes
_forwards = {warps: Launcher(_forward, num_warps=warps) for warps in (1, 2, 4, 8, 16)}
_backwards = {warps: Launcher(_backward, num_warps=warps) for warps in (1, 2, 4, 8, 16)}


def rms_norm(x_mh: torch.Tensor, weight_h: torch.Tensor, eps: float, out_mh: torch.Tensor | ScaledRows) -> None:
    """See `reference.rms_norm`."""
    rows, hidden = x_mh.shape
    out = parts_of(out_mh)
    _forwards[_warps(hidden)](
        (rows,),
        x_mh, x_mh, weight_h, x_mh, *out.tensors, x_mh.stride(0), 0, 0, *out.strides, hidden, eps,
        False, out.is_scaled, power_of_two(hidden),
    )  # fmt: skip


def add_rms_norm(
    x_mh: torch.Tensor,
    update_mh: torch.Tensor,
    weight_h: torch.Tensor,
    eps: float,
    sum_mh: torch.Tensor,
    out_mh: torch.Tensor | ScaledRows,
) -> None:
    """See `reference.add_rms_norm`."""
    rows, hidden = x_mh.shape
    out = parts_of(out_mh)
    _forwards[_warps(hidden)](
        (rows,),
        x_mh, update_mh, weight_h, sum_mh, *out.tensors,
        x_mh.stride(0), update_mh.stride(0), sum_mh.stride(0), *out.strides, hidden, eps,
        True, out.is_scaled, power_of_two(hidden),
    )  # fmt: skip


def rms_norm_backward(
    gradient_mh: torch.Tensor,
    x_mh: torch.Tensor,
    weight_h: torch.Tensor,
    eps: float,
    residual_mh: torch.Tensor | None,
    out_mh: torch.Tensor | ScaledRows,
) -> None:
    """See `reference.rms_norm_backward`."""
    rows, hidden = x_mh.shape
    added = gradient_mh if residual_mh is None else residual_mh
    out = parts_of(out_mh)
    _backwards[_warps(hidden)](
        (rows,),
        gradient_mh, x_mh, weight_h, added, *out.tensors,
        gradient_mh.stride(0), x_mh.stride(0), added.stride(0), *out.strides, hidden, eps,
        residual_mh is not None, out.is_scaled, power_of_two(hidden),
    )  # fmt: skip


def _warps(hidden: int) -> int:
    block: int = power_of_two(hidden)
    return min(16, max(1, block // 512))
