"""The norm after the last layer, which Transformers computes in float32.

For its backward it keeps a float32 copy of its input and makes five more tensors of that size: 24 bytes for each number of the
residual stream, the peak of a step with every layer kept, and of rows of over 100,000 tokens (H100, `python -m bench.peak`).
Here its input is kept, which is the last layer's output, and the gradient takes as much again: 4 bytes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nybble.engine import graph
from nybble.kernels import operations as ops


class FinalNorm:
    """Gives a backbone's norm a fused forward where it is trained through; `remove` takes it away."""

    def __init__(self, norm: torch.nn.Module) -> None:
        # A pickled model has its class's forward there, and a copied one this file's.
        own = getattr(norm.__dict__.get("forward"), "__func__", None) if "forward" in norm.__dict__ else forward
        self._norm = norm if type(norm) is LlamaRMSNorm and own in (forward, LlamaRMSNorm.forward) else None
        if self._norm is not None:
            self._norm.forward = types.MethodType(forward, self._norm)

    def remove(self) -> None:
        """Restore the original forward, unless somebody has put another one there since."""
        if self._norm is not None and getattr(self._norm.__dict__.get("forward"), "__func__", None) is forward:
            del self._norm.forward


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_h: torch.Tensor, eps: float) -> torch.Tensor:
        operations = ops.choose(x.device).operations
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(x):
            operations.rms_norm(_rows(x), weight_h, eps, _rows(normed))
        ctx.save_for_backward(x, weight_h)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        graph.refuse_second_derivatives()
        x, weight_h = ctx.saved_tensors
        operations = ops.choose(x.device).operations
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(x):
            operations.rms_norm_backward(_rows(gradient), _rows(x), weight_h, ctx.eps, None, _rows(result))
        return result, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., h) as (m, h)."""
    return x.detach().contiguous().flatten(0, -2)


def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A norm as `fuse` computes it: the original forward without gradients, and where types differ or the weight is trained."""
    is_trained_through = torch.is_grad_enabled() and hidden_states.requires_grad and not self.weight.requires_grad
    if not is_trained_through or self.weight.dtype != hidden_states.dtype:
        result: torch.Tensor = type(self).forward(self, hidden_states)
        return result
    fused: torch.Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return fused
