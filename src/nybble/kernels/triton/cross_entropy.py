"""Cross-entropy of a chunk of logits, which are overwritten by their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.triton.launch import Launcher

BLOCK = 4096


@triton.jit
def _cross_entropy(logits, targets, losses, stride, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    first = logits + row * stride
    highest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(first + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(value))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(value - above))
        highest = above
    counted = target >= 0
    wanted = tl.load(first + target, mask=counted, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counted, tl.log(total) + highest - wanted, 0.0))
    weight = tl.where(counted, 1.0, 0.0)
    tl.debug_barrier()  # the wanted logit is read before another thread overwrites it
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        value = tl.load(first + column, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - highest) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(first + column, (gradient * weight).to(logits.dtype.element_ty), mask=inside)


_launch = Launcher(_cross_entropy, num_warps=8)


def cross_entropy(logits_mv: torch.Tensor, targets_m: torch.Tensor, losses_m: torch.Tensor) -> None:
    """See `reference.cross_entropy`."""
    rows, vocabulary = logits_mv.shape
    _launch((rows,), logits_mv, targets_m, losses_m, logits_mv.stride(0), vocabulary, BLOCK)
