"""What the running backward was called with: whether its graph is retained, and second derivatives, which are refused."""

from __future__ import annotations

import torch

from nybble.errors import EngineError

FREED_MESSAGE = (
    "backward a second time through {}: the first has freed what it needs; call the first with retain_graph=True"
)


def is_retained() -> bool:
    """Within a backward: whether there may be another one through the same graph (retain_graph=True)."""
    is_kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return is_kept


def refuse_second_derivatives() -> None:
    """Within a backward: gradients have no graph of their own here, so second derivatives would silently lack a part.

    Raises:
        EngineError: the backward was called with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise EngineError(
            "backward was called with create_graph=True, and the fused engine has no second derivatives",
            fix="leave out create_graph=True (retain_graph=True is enough for two backwards), or nybble.unfuse(model)",
        )
