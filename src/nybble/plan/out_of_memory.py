"""What to do when a GPU does not have enough memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nybble.errors import TrainingError
from nybble.plan.ledger import ADAPTER, GRADIENT, base_bytes, optimizer_state
from nybble.plan.shapes import ModelShape
from nybble.recipe import Recipe
from nybble.terminal import bytes_text


@contextlib.contextmanager
def explained_memory(recipe: Recipe, shape: ModelShape) -> Iterator[None]:
    """Turn running out of memory into an error that says what takes it, and names the cheapest change that may help.

    Args:
        recipe: of the run.
        shape: of its base.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU does not have enough memory: {str(error).splitlines()[0]} {_needs(recipe, shape)}",
            fix=leaner(recipe, tied=shape.tied),
        ) from error


def _needs(recipe: Recipe, shape: ModelShape) -> str:
    """What a run takes before its first activation."""
    model, lora = recipe.model, recipe.lora
    base = base_bytes(shape, model.quantization, model.double_quantization, element=2).total
    text = f"Before any activations the base takes about {bytes_text(base)}"
    if recipe.adapter:  # whose rank and targets are its own
        return text
    targets = shape.projections if lora.targets == "all-linear" else shape.projections.keys() & set(lora.targets)
    trained = shape.adapter_parameters(lora.r, targets, dora=lora.dora)
    name = "paged_adamw_8bit" if recipe.train.optimizer == "auto" else recipe.train.optimizer
    adapter = (ADAPTER + GRADIENT) * trained + optimizer_state([trained], name).total
    return f"{text}, and the adapter with its gradients and its optimiser's state {bytes_text(adapter)}"


def leaner(recipe: Recipe, *, tied: bool) -> str:
    """The cheapest change that saves memory and has not been made yet.

    Args:
        recipe: of the run.
        tied: whether the model's embedding is its head too, and cannot be moved to the host.
    """
    train, engine = recipe.train, recipe.engine
    halved = f"train.micro_batch={train.micro_batch // 2} train.accumulation={train.accumulation * 2} (the same step)"
    movable = engine.fused and engine.embedding == "device" and train.processes == 1 and not tied
    steps = [
        (recipe.model.quantization == "none", "model.quantization=nf4"),
        (engine.fused and engine.policy not in ("auto", "host"), "engine.policy=auto (the same step, slower)"),
        (train.micro_batch > 1, halved),
        (not engine.fused and not train.gradient_checkpointing, "train.gradient_checkpointing=true"),
        (engine.fused and engine.policy != "host", "engine.policy=host (the same step, slower)"),
        (movable, "engine.embedding=host"),
    ]
    return next((fix for holds, fix in steps if holds), f"data.max_length={recipe.data.max_length // 2}")
