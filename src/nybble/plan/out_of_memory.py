"""What to do when a GPU does not have enough memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nybble.errors import TrainingError
from nybble.recipe import Recipe


@contextlib.contextmanager
def explained_memory(recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory into an error that names the cheapest change that may help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU does not have enough memory: {str(error).splitlines()[0]}", fix=leaner(recipe)
        ) from error


def leaner(recipe: Recipe) -> str:
    """The cheapest change that saves memory and has not been made yet."""
    train, engine = recipe.train, recipe.engine
    halved = f"train.micro_batch={train.micro_batch // 2} train.accumulation={train.accumulation * 2} (the same step)"
    steps = [
        (recipe.model.quantization == "none", "model.quantization=nf4"),
        (engine.fused and engine.policy not in ("auto", "host"), "engine.policy=auto (the same step, slower)"),
        (train.micro_batch > 1, halved),
        (not engine.fused and not train.gradient_checkpointing, "train.gradient_checkpointing=true"),
        (engine.fused and engine.policy != "host", "engine.policy=host (the same step, slower)"),
        (engine.fused and engine.embedding == "device" and train.processes == 1, "engine.embedding=host"),
    ]
    return next((fix for holds, fix in steps if holds), f"data.max_length={recipe.data.max_length // 2}")
