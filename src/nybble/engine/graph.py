"""What the backward that runs now is asked for: whether its graph is kept, and derivatives that nobody here computes."""

from __future__ import annotations

import torch

from nybble.errors import EngineError

FREED = "backward a second time through {}: the first has freed what it needs; call the first with retain_graph=True"


def is_kept() -> bool:
    """Whether there may be another backward through the same graph (retain_graph=True); asked within a backward."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def refuse_second_derivatives() -> None:
    """Within a backward: gradients come out as plain numbers here, so what is built on them would silently lack a part.

    Raises:
        EngineError: the backward was called with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise EngineError(
            "backward was called with create_graph=True, and the fused engine has no second derivatives",
            fix="leave out create_graph=True (retain_graph=True is enough for two backwards), or nybble.unfuse(model)",
        )
