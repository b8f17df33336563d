"""Losses computed as in training, so that `nybble eval` and the run's own validation measure the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nybble.engine.fuse import fuse, unfuse
from nybble.errors import EngineError


@contextlib.contextmanager
def computed_as_in_training(model: Any, fused: bool) -> Iterator[None]:
    """Fuse a model for a while, if the engine can compute it; else Transformers and PEFT do, as in training.

    PEFT rounds the outputs of base and adapter to the compute type before it adds them, so in bfloat16 a small update is partly
    lost: after one step of AdamW, SmolLM2 had a loss of 4.5638 in float32, 4.5634 by the engine, and 4.897 by PEFT.

    Args:
        model: the base with its adapter.
        fused: the recipe's engine.fused.
    """
    with contextlib.ExitStack() as undo:
        if fused:
            with contextlib.suppress(EngineError):
                fuse(model)
                undo.callback(unfuse, model)
        yield
