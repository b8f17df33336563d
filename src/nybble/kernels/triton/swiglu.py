"""SwiGLU, and its backward in place, which recomputes the activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton.launch import Launcher, blocks_of

BLOCK = 1024


@triton.jit
def _forward(gate_up, out, gate_up_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    address = gate_up + row * gate_up_stride + column
    gate = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(address + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gradient, gate_up, gradient_stride, gate_up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    address = gate_up + row * gate_up_stride + column
    to_active = gradient + row * gradient_stride + column
    gate = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(address + width, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(to_active, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    to_gate = change * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(address, to_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(address + width, (change * silu).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(to_active, (silu * up).to(gradient.dtype.element_ty), mask=inside)


_launch_forward, _launch_backward = Launcher(_forward, num_warps=4), Launcher(_backward, num_warps=4)


def swiglu(gate_up_mi: torch.Tensor, out_mi: torch.Tensor) -> None:
    """See `reference.swiglu`."""
    rows, width = out_mi.shape
    grid = (rows, blocks_of(width, BLOCK))
    _launch_forward(grid, gate_up_mi, out_mi, gate_up_mi.stride(0), out_mi.stride(0), width, BLOCK)


def swiglu_backward(gradient_mi: torch.Tensor, gate_up_mi: torch.Tensor) -> None:
    """See `reference.swiglu_backward`."""
    rows, width = gradient_mi.shape
    grid = (rows, blocks_of(width, BLOCK))
    _launch_backward(grid, gradient_mi, gate_up_mi, gradient_mi.stride(0), gate_up_mi.stride(0), width, BLOCK)
