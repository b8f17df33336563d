"""Cross-entropy over a large vocabulary without a batch's logits: the head is applied to chunks of rows.

The head is frozen, so only the gradient of its input is needed, and that is computed in the same pass: a chunk's
logits become their gradients in place and are multiplied by the head at once (after Hsu et al. 2024, Liger Kernel, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nybble.engine import graph
from nybble.kernels import operations as ops
from nybble.plan.policies import LOSS_CHUNK, LOSS_MULTIPLE

PADDED_DEVICES = ("cuda",)
"""Devices where the rows of a chunk are padded to LOSS_MULTIPLE. On a CPU each row more has to be computed."""


def summed_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the cross-entropy in nats, a float32 scalar that can be differentiated with respect to `hidden`.

    Args:
        hidden: (..., h) what the head is applied to.
        head: (vocabulary, h), frozen.
        targets: (...) int64, the token that each row predicts; negative where it predicts none.
        rows: indices of the flattened rows that have a target; without them all rows are computed. The host passes them, so
            that it need not wait for the device.
    """
    hidden_mh, targets_m = hidden.flatten(0, -2), targets.flatten()
    if rows is not None:
        hidden_mh, targets_m = hidden_mh[rows], targets_m[rows]
    return cross_entropies(hidden_mh, head, targets_m).sum()


def cross_entropies(hidden_mh: torch.Tensor, head: torch.Tensor, targets_m: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each row in nats, float32 (m,), that can be differentiated with respect to `hidden_mh`.

    Args:
        hidden_mh: (m, h) what the head is applied to.
        head: (vocabulary, h), frozen.
        targets_m: (m,) int64, the token that each row predicts; negative where it predicts none.
    """
    assert not head.requires_grad, "the head is frozen here"
    losses: torch.Tensor = _ChunkedLoss.apply(hidden_mh, head, targets_m)  # type: ignore[no-untyped-call]
    return losses


def last_hidden(model: torch.nn.Module, backbone: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The backbone's last hidden states, (batch, length, h), of a call through the whole model, which may be wrapped.

    The head is called with no rows, so no logits are computed.
    """
    found: list[torch.Tensor] = []
    hook = backbone.register_forward_hook(lambda _module, _args, output: found.append(output.last_hidden_state))
    try:
        nothing = torch.empty(0, dtype=torch.int64, device=inputs["input_ids"].device)
        model(**inputs, logits_to_keep=nothing, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def _padded_count(rows: int, device: torch.device) -> int:
    """How many rows are computed for this many rows, padding included."""
    return -(-rows // LOSS_MULTIPLE) * LOSS_MULTIPLE if device.type in PADDED_DEVICES else rows


def _pad(rows: torch.Tensor, part: slice, value: int) -> torch.Tensor:
    """The rows, padded with a value to the length of a part."""
    missing = part.stop - part.start - len(rows)
    return torch.cat((rows, rows.new_full((missing, *rows.shape[1:]), value))) if missing else rows


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_mh: torch.Tensor, head: torch.Tensor, targets_m: torch.Tensor) -> torch.Tensor:
        operations = ops.choose(hidden_mh.device).operations
        count, padded = len(hidden_mh), _padded_count(len(hidden_mh), hidden_mh.device)
        gradient_mh = hidden_mh.new_empty(padded, head.shape[1]) if ctx.needs_input_grad[0] else None
        losses = torch.empty(padded, dtype=torch.float32, device=hidden_mh.device)
        with torch.autocast(hidden_mh.device.type, enabled=False), torch.cuda.device_of(hidden_mh):
            for first in range(0, padded, LOSS_CHUNK):
                part = slice(first, min(first + LOSS_CHUNK, padded))
                logits = _pad(hidden_mh[part].to(head.dtype), part, 0) @ head.t()
                operations.cross_entropy(logits, _pad(targets_m[part], part, -100), losses[part])
                if gradient_mh is not None and gradient_mh.dtype == head.dtype:
                    torch.mm(logits, head, out=gradient_mh[part])
                elif gradient_mh is not None:
                    gradient_mh[part] = logits @ head
                del logits  # or the next chunk's exist beside them: 263 MB with Llama 3's vocabulary
        ctx.gradient_mh = None if gradient_mh is None else gradient_mh[:count]
        return losses[:count]

    @staticmethod
    def backward(ctx: Any, gradient_m: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        graph.refuse_second_derivatives()
        result = ctx.gradient_mh
        if result is None:
            raise RuntimeError(graph.FREED_MESSAGE.format("the chunked loss"))
        if graph.is_retained():
            return (result * gradient_m[:, None]).to(result.dtype), None, None
        ctx.gradient_mh = None
        return result.mul_(gradient_m[:, None]), None, None
