"""What a run needs before its first step: processes, data, a matching vocabulary, fused layers."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.couplings.check import first_incompatibility
from nybble.data.sets.prepare import Prepared
from nybble.data.text.saved_template import read_template
from nybble.distributed.group import GROUP_TIMEOUT, in_group
from nybble.distributed.launcher import placement, refuse_other_size, refuse_sharding
from nybble.distributed.meeting import meet
from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.fusion import Fusion
from nybble.errors import EngineError, ModelError, TrainingError
from nybble.installed import pip
from nybble.model.base.load import Base, Footprint
from nybble.model.device import choose_device, grow_segments
from nybble.plan.schedule import Schedule
from nybble.preflight.preparation import Stage, prepare_run
from nybble.recipe import Recipe
from nybble.training.memory import MemoryPlan
from nybble.training.messages import print_data, print_engine

STAGES: dict[Stage, str] = {
    "reading": "reading the data",
    "reading validation": "reading the validation data",
    "checking": "checking what is trained",
}


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a run needs before its first step."""

    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    schedule: Schedule
    base: Base
    footprint: Footprint
    model: PeftModel
    trained_parameters: int
    fusion: Fusion | None
    cache: pathlib.Path
    memory: MemoryPlan | None
    """None where none was made: on a CPU, and where Transformers computes the layers."""


def join_processes(recipe: Recipe) -> tuple[PartialState, torch.device]:
    """This process's state and device.

    Raises:
        DeviceError: there are more or fewer processes than requested, or the launcher's variables do not fit together, or the
            others do not arrive.
        TrainingError: a library lacks something that training needs.
    """
    if (problem := first_incompatibility("training", "data", "model")) is not None:
        raise TrainingError(problem.what, fix=f"{pip()} install {problem.requirement}")
    refuse_sharding()
    requested, place = recipe.train.processes, placement()
    refuse_other_size(requested)
    device = choose_device(recipe.model.device, place.local_rank)
    on_cpu = device.type == "cpu"
    store = meet(place, "training", device.type) if requested > 1 else None
    settings = {"timeout": GROUP_TIMEOUT, **({"backend": "gloo"} if on_cpu else {})} if requested > 1 else {}
    if not on_cpu:
        grow_segments()
    state = PartialState(cpu=on_cpu, **settings)
    del store  # by now the process group has it
    assert state.num_processes == requested, "Accelerate sees another number of processes"
    return state, device


@contextlib.contextmanager
def processes_left() -> Iterator[None]:
    """Undo `join_processes` afterwards: torch warns about a process group that is still open when the interpreter ends.

    After a failure NCCL's stays: leaving it would wait for exchanges with processes that are gone. The launcher silences that
    warning (`nybble.distributed.spawn`).
    """
    completed = False
    try:
        yield
        completed = True
    finally:
        if in_group() and (completed or torch.distributed.get_backend() == "gloo"):
            torch.distributed.destroy_process_group()


def prepare_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    console: Console,
    cache: pathlib.Path,
    folder: pathlib.Path,
) -> Prepared:
    """The rows, checked with the steps that the recipe makes of them.

    A resumed run in `folder` uses its saved template, with the day on which the run was started.
    """
    started, file = time.perf_counter(), folder / "template.json"
    template = read_template(tokenizer, file) if file.exists() else None
    with console.status("reading the data") as status:

        def show(stage: Stage, rows: int) -> None:
            status.update(f"{STAGES[stage]}: {rows:,} rows")

        prepared = prepare_run(recipe, tokenizer, config, cache, progress=show, template=template)
    assert prepared.data is not None, "faults were raised"
    print_data(console, prepared.data, recipe.data, time.perf_counter() - started)
    return prepared.data


def check_vocabulary(data: Prepared, base: Base) -> None:
    """Raise ModelError if the data has a token id without an embedding."""
    rows = base.model.get_input_embeddings().num_embeddings
    if data.counts.highest_id >= rows:
        raise ModelError(
            f"the tokenizer gives token id {data.counts.highest_id}, but the model has embeddings for ids 0 to {rows - 1:,}",
            where=str(base.checkpoint.folder),
            fix="use the tokenizer that came with the weights",
        )


def fuse_layers(model: PeftModel, recipe: Recipe, console: Console) -> Fusion | None:
    """Fuse the layers; Transformers computes a model or adapter that the engine does not support.

    Raises:
        EngineError: the recipe sets engine options that are not possible for this model.
    """
    if not recipe.engine.fused:
        print_engine(console, None, "engine.fused=false")
        return None
    try:
        engine = recipe.engine
        fuse(
            model, engine.policy, embedding=engine.embedding, weights=engine.weights,
            resident_layers=engine.resident_layers, compute=engine.compute, fp8_skip=engine.fp8_skip,
            fp8_fast=engine.fp8_fast,
        )  # fmt: skip
    except EngineError as error:
        if recipe.engine.is_customised:
            raise
        print_engine(console, None, error.what)
        return None
    result = fusion(model)
    assert result is not None
    if not result.fused:
        why = result.last.refusals[0]
        unfuse(model)
        if recipe.engine.is_customised:
            raise EngineError(
                f"none of {result.fallen_back} decoder layers can be fused: {why}",
                fix="leave engine.policy, embedding, weights and compute out: the layers are then computed by Transformers",
            )
        print_engine(console, None, why)
        return None
    result.budget.chunked_loss = True
    print_engine(console, result, "")
    return result
