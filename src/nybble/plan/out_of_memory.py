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
    """Turn running out of memory into an error that says what takes the memory, and names the cheapest change that may help.

    Args:
        recipe: the run's recipe.
        shape: sizes of its base.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU does not have enough memory: {str(error).splitlines()[0]} {_needs(recipe, shape)}",
            fix=memory_saving_change(recipe, tied=shape.tied),
        ) from error


def _needs(recipe: Recipe, shape: ModelShape) -> str:
    """The memory that a run takes before its first activation, as a sentence."""
    model, lora = recipe.model, recipe.lora
    base = base_bytes(shape, model.quantization, model.double_quantization, element=2).total
    text = f"Before any activations the base takes about {bytes_text(base)}"
    if recipe.adapter:  # its rank and targets are not in the recipe
        return text
    targets = shape.projections if lora.targets == "all-linear" else shape.projections.keys() & set(lora.targets)
    trained = shape.adapter_parameters(lora.r, targets, dora=lora.dora)
    name = "paged_adamw_8bit" if recipe.train.optimizer == "auto" else recipe.train.optimizer
    adapter = (ADAPTER + GRADIENT) * trained + optimizer_state([trained], name).total
    return f"{text}, and the adapter with its gradients and its optimiser's state {bytes_text(adapter)}"


def memory_saving_change(recipe: Recipe, *, tied: bool) -> str:
    """The cheapest change that saves memory and has not been made yet.

    Args:
        recipe: the run's recipe.
        tied: whether the model's head is tied to its embedding, which then cannot be moved to the host.
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
    return next((fix for applies, fix in steps if applies), f"data.max_length={recipe.data.max_length // 2}")
