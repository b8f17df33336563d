"""What to do when a GPU does not have enough memory."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
from collections.abc import Iterator, Mapping

import torch

from nybble.errors import TrainingError
from nybble.plan.free_memory import device_memory
from nybble.plan.ledger import ADAPTER, GRADIENT, base_bytes, optimizer_state
from nybble.plan.placing import Rows, as_written, elsewhere, may_move_embedding, may_stream
from nybble.plan.schedule import smaller_micro_batch
from nybble.plan.shapes import ModelShape
from nybble.plan.step import ADAPTERS, GRADIENTS, OPTIMIZER, unplanned, work_of
from nybble.recipe import Recipe
from nybble.recipe.options.memory import memory_bytes
from nybble.terminal import bytes_text


@contextlib.contextmanager
def explained_memory(recipe: Recipe, shape: ModelShape, run: pathlib.Path) -> Iterator[None]:
    """Turn running out of memory into an error that says what takes the memory, and names the cheapest change that may help.

    Args:
        recipe: the run's recipe.
        shape: sizes of its base.
        run: the run's folder, which may not exist.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        measured = torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None
        raise TrainingError(
            f"the GPU does not have enough memory: {str(error).splitlines()[0]}\n"
            + memory_table(_predicted(recipe, shape), measured),
            where=f"micro batch {recipe.train.micro_batch}, rows of up to {recipe.data.max_length} tokens",
            fix=_command(run, memory_saving_change(recipe, shape)),
        ) from error


def memory_table(predicted: Mapping[str, int], measured: int | None) -> str:
    """What was planned beside what was reserved, one item per line.

    Args:
        predicted: bytes by item.
        measured: the largest number of bytes that torch has reserved; None without a GPU.
    """
    lines = {**predicted, "planned, in total": sum(predicted.values())}
    if measured is not None:
        lines["reserved at most"] = measured
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}} {bytes_text(count):>10}" for name, count in lines.items())


def _predicted(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Bytes of a training step by item: with the longest rows that the recipe allows, or before the first activation where that
    is not planned."""
    if unplanned(recipe) is None:
        limit = memory_bytes(recipe.train.vram) if recipe.train.vram is not None else None
        if limit is None and torch.cuda.is_initialized():
            limit = device_memory("cuda").total
        return dict(as_written(recipe, shape, limit, Rows()).prediction.moment("step").items)
    model = recipe.model
    base = {f"base ({model.quantization})": base_bytes(shape, model.quantization, model.double_quantization, 2).total}
    if recipe.adapter:  # its rank and targets are not in the recipe
        return base
    work = work_of(recipe, shape)
    state = optimizer_state([work.trained], work.optimizer).resident
    return {**base, ADAPTERS: ADAPTER * work.trained, GRADIENTS: GRADIENT * work.trained, OPTIMIZER: state}


def _command(run: pathlib.Path, change: str) -> str:
    """The command that trains with a change: in place if only the split of its steps changes, else as another run."""
    if not (run / "recipe.yaml").exists():
        return f"the same command with {change}"
    folder = shlex.quote(str(run))
    words, _, note = change.partition(" (")
    if words.startswith("train.micro_batch="):
        return f"in {folder}/recipe.yaml set {change}, then: nybble train --resume {folder}"
    return f"nybble train -c {folder}/recipe.yaml out=ANOTHER {words}" + (f"; {note.removesuffix(')')}" if note else "")


def memory_saving_change(recipe: Recipe, shape: ModelShape) -> str:
    """The cheapest change that saves memory and has not been made yet.

    Args:
        recipe: the run's recipe.
        shape: sizes of its base.
    """
    train, engine = recipe.train, recipe.engine
    smaller = smaller_micro_batch(train.micro_batch, train.accumulation)
    halved = "train.micro_batch={} train.accumulation={} (the same step)".format(*smaller) if smaller else ""
    movable = engine.fused and engine.embedding == "device" and may_move_embedding(recipe, shape)
    streamable = unplanned(recipe) is None and engine.weights == "device" and may_stream(recipe)
    steps = [
        (recipe.model.quantization == "none", "model.quantization=nf4"),
        (engine.fused and engine.policy not in ("auto", "host"), "engine.policy=auto (the same step, slower)"),
        (smaller is not None, halved),
        (not engine.fused and not train.gradient_checkpointing, "train.gradient_checkpointing=true"),
        (engine.fused and engine.policy != "host", "engine.policy=host (the same step, slower)"),
        (movable, "engine.embedding=host"),
        (engine.weights == "sharded", "engine.weights=sharded-host (the same step, slower)"),
        (streamable, f"engine.weights={elsewhere(recipe)} (the same step, slower)"),
        (engine.resident_layers > 0, "engine.resident_layers=0 (the same step, slower)"),
    ]
    return next((fix for applies, fix in steps if applies), f"data.max_length={recipe.data.max_length // 2}")
