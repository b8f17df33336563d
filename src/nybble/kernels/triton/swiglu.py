"""SwiGLU, and its backward in place, which recomputes the activation.

A row in e4m3 needs its largest magnitude first. A row is too wide for registers (11,008 numbers of gate and as many of up for
Llama 2 7B), so its program computes it twice: the second reading comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.scaled import ScaledRows
from nybble.kernels.triton.launch import Launcher, blocks_of
from nybble.kernels.triton.scaled import magnitudes, scale_of

BLOCK = 1024
ROW_BLOCK = 2048  # of a program that computes a whole row


@triton.jit
def _activation(gate_up, column, inside, width):
    """silu(gate) x up of one row."""
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + column + width, mask=inside, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gradients(gradient, gate_up, column, inside, width):
    """Of one row: the gradients of gate and of up, and the activation."""
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + column + width, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(gradient + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return change * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), change * silu, silu * up


@triton.jit
def _forward(gate_up, out, gate_up_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = _activation(gate_up + row * gate_up_stride, column, inside, width)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gradient, gate_up, gradient_stride, gate_up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_up += row * gate_up_stride
    gradient += row * gradient_stride
    to_gate, to_up, active = _gradients(gradient, gate_up, column, inside, width)
    tl.store(gate_up + column, to_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gate_up + column + width, to_up.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gradient + column, active.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _forward_scaled(
    gate_up, out, values, scales, gate_up_stride, out_stride, values_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_up_stride
    out += row * out_stride
    values += row * values_stride
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = _activation(gate_up, column, column < width, width)
        largest = tl.maximum(largest, magnitudes(value.to(out.dtype.element_ty).to(tl.float32)))
    scale, inverse = scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = _activation(gate_up, column, inside, width).to(out.dtype.element_ty)
        tl.store(out + column, value, mask=inside)
        tl.store(values + column, (value.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=inside)


@triton.jit
def _backward_scaled(
    gradient, gate_up, values, scales, gradient_stride, gate_up_stride, values_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * gate_up_stride
    gradient += row * gradient_stride
    values += row * values_stride
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        to_gate, to_up, active = _gradients(gradient, gate_up, column, column < width, width)
        largest = tl.maximum(largest, magnitudes(to_gate.to(gate_up.dtype.element_ty).to(tl.float32)))
        largest = tl.maximum(largest, magnitudes(to_up.to(gate_up.dtype.element_ty).to(tl.float32)))
    scale, inverse = scale_of(tl.max(largest))
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        to_gate, to_up, active = _gradients(gradient, gate_up, column, inside, width)
        gate, up = to_gate.to(gate_up.dtype.element_ty), to_up.to(gate_up.dtype.element_ty)
        tl.store(gate_up + column, gate, mask=inside)
        tl.store(gate_up + column + width, up, mask=inside)
        tl.store(gradient + column, active.to(gradient.dtype.element_ty), mask=inside)
        tl.store(values + column, (gate.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=inside)
        tl.store(values + column + width, (up.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=inside)


_launch_forward, _launch_backward = Launcher(_forward, num_warps=4), Launcher(_backward, num_warps=4)
_launch_forward_scaled, _launch_backward_scaled = (
    Launcher(_forward_scaled, num_warps=8),
    Launcher(_backward_scaled, num_warps=8),
)


def swiglu(gate_up_mi: torch.Tensor, out_mi: torch.Tensor | ScaledRows) -> None:
    """See `reference.swiglu`."""
    if isinstance(out_mi, ScaledRows):
        rows, width = out_mi.wide.shape
        _launch_forward_scaled(
            (rows,), gate_up_mi, out_mi.wide, out_mi.values, out_mi.scales,
            gate_up_mi.stride(0), out_mi.wide.stride(0), out_mi.values.stride(0), width, ROW_BLOCK,
        )  # fmt: skip
        return
    rows, width = out_mi.shape
    grid = (rows, blocks_of(width, BLOCK))
    _launch_forward(grid, gate_up_mi, out_mi, gate_up_mi.stride(0), out_mi.stride(0), width, BLOCK)


def swiglu_backward(gradient_mi: torch.Tensor, gate_up_mi: torch.Tensor | ScaledRows) -> None:
    """See `reference.swiglu_backward`."""
    rows, width = gradient_mi.shape
    if isinstance(gate_up_mi, ScaledRows):
        _launch_backward_scaled(
            (rows,), gradient_mi, gate_up_mi.wide, gate_up_mi.values, gate_up_mi.scales,
            gradient_mi.stride(0), gate_up_mi.wide.stride(0), gate_up_mi.values.stride(0), width, ROW_BLOCK,
        )  # fmt: skip
        return
    grid = (rows, blocks_of(width, BLOCK))
    _launch_backward(grid, gradient_mi, gate_up_mi, gradient_mi.stride(0), gate_up_mi.stride(0), width, BLOCK)
