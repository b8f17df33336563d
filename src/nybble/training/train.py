"""From a recipe to a run folder, as numbered steps."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.distributed.launcher import rank
from nybble.errors import RecipeError
from nybble.evaluate.scores import Benchmarks
from nybble.files.paths import default_cache
from nybble.model.adapter.lora import attach_adapter, check_stored, resume_adapter
from nybble.model.base.checkpoint import check_length, find_checkpoint
from nybble.model.base.load import Base, load_base, load_config, measure
from nybble.model.device import choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.out_of_memory import explained_memory
from nybble.plan.schedule import plan_steps
from nybble.preflight.plan.sizes import sizes_in
from nybble.recipe import Recipe, absolute_paths
from nybble.recipe.options.rate import AUTO
from nybble.run.folder import Run, choose_folder, default_name, open_run, refuse_existing
from nybble.run.identity import check_template_and_tokenizer
from nybble.run.marks import check_adapter, read_mark
from nybble.run.rate import FoundRate
from nybble.run.records import write_record
from nybble.run.split import on_processes
from nybble.run.start import halved_from
from nybble.run.summary import Summary
from nybble.terminal import tell
from nybble.training.beginning import (
    base_of_resumed,
    lock_run,
    open_run_folder,
    refuse_finished,
    refuse_missing_benchmarks,
    refuse_moved_base,
    run_guarded,
)
from nybble.training.card import draw_loss, write_card
from nybble.training.checkpoints import Resumption, resumption
from nybble.training.ending import cleanup_on_failure, paths_in, refuse_untrained, save_adapter, summarise
from nybble.training.halving import Halved, halve, train_or_halve
from nybble.training.interrupt import Interruption
from nybble.training.loop import run_trainer
from nybble.training.memory import check_limit, plan_memory
from nybble.training.messages import print_adapter, print_base, print_plan, print_result
from nybble.training.preparation import TrainingSetup, check_vocabulary, fuse_layers, join_processes, prepare_data
from nybble.training.rate_plot import write_search
from nybble.training.rate_search import with_rate
from nybble.training.recorder import Recorder
from nybble.training.resource_use import ResourceUse
from nybble.training.shared_parts import PreparedData, SharedParts
from nybble.training.watching import Watch

PreflightCheck = Callable[[PretrainedConfig, PreTrainedTokenizerBase, pathlib.Path], None]
"""Checks whether export.to can work with a configuration, a tokenizer and the run folder; raises if it cannot."""


def train(
    recipe: Recipe, *, console: Console | None = None, cache: pathlib.Path | None = None,
    benchmarks: Benchmarks | None = None, preflight: PreflightCheck | None = None, parts: SharedParts | None = None,
    watch: Watch | None = None,
) -> Run:  # fmt: skip
    """Train an adapter as a recipe says; returns the finished run.

    Args:
        recipe: all options.
        console: where progress is shown.
        cache: folder of quantised bases and tokenised data; None for the user's default.
        benchmarks: runs train.eval_tasks, `nybble.evaluate.harness.Harness`; None if there are none.
        preflight: checks whether export.to can work; None if nothing is exported.
        parts: the base and the data of an earlier training in this process, and for a later one; None if there is neither.
        watch: is shown each validation loss, and may end the run.

    Raises:
        NybbleError: something is wrong with recipe, data, model or machine; no partial run folder is left behind.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step in progress is done and saved; after a second one at once.
    """
    folder, cache = choose_folder(recipe), cache or default_cache()
    if not rank():
        refuse_existing(folder)
    with run_guarded(recipe, folder, cache) as stack:
        attempt = functools.partial(
            _train, folder=folder, console=console or Console(), cache=cache, benchmarks=benchmarks,
            preflight=preflight, parts=parts, watch=watch, stack=stack,
        )  # fmt: skip
        return train_or_halve(attempt, absolute_paths(recipe), None, benchmarks)


def resume(
    folder: str | pathlib.Path, *, processes: int | None = None, console: Console | None = None,
    cache: pathlib.Path | None = None, benchmarks: Benchmarks | None = None, preflight: PreflightCheck | None = None,
) -> Run:  # fmt: skip
    """Resume an interrupted run from its newest complete checkpoint, exactly as it would have continued.

    Args:
        folder: the run folder.
        processes: how many train from now on, each with its share of the same steps; None for as many as before.
        console, cache, benchmarks, preflight: as for `train`.

    Raises:
        RunError: the run is finished or damaged, another process is writing it, recipe, data, base or versions changed
            since it was started, or its steps cannot be divided among so many processes.
    """
    run, cache = on_processes(open_run(folder), processes), cache or default_cache()
    refuse_finished(run)
    refuse_moved_base(run)
    with run_guarded(run.recipe, run.folder, cache) as stack:
        lock_run(stack, run, "resumed")
        refuse_finished(run)  # a process that held the lock until now may have finished it
        check_template_and_tokenizer(run)
        attempt = functools.partial(
            _train, folder=run.folder, console=console or Console(), cache=cache, benchmarks=benchmarks,
            preflight=preflight, parts=None, watch=None, stack=stack,
        )  # fmt: skip
        return train_or_halve(attempt, run.recipe, resumption(run), benchmarks)


def find_rate(recipe: Recipe, *, console: Console | None = None, cache: pathlib.Path | None = None) -> FoundRate:
    """Suggest a learning rate for a recipe by one short run with a rising one, whatever rate the recipe names.

    The curve is written to learning_rate.json and learning_rate.png in OUT-rate, beside the run that the recipe names, or in
    runs/MODEL-DATA-rate.

    Raises:
        NybbleError: something is wrong with recipe, data, model or machine.
        RecipeError: its objective has no loss by which a rate could be judged.
        TrainingError: the loss fell at no rate.
    """
    if (objective := recipe.train.objective) != "supervised":
        raise RecipeError(
            f"a rate is judged by a loss in nats per token, which train.objective={objective} has not",
            fix="search it: nybble sweep train.learning_rate=1e-6..1e-4",
        )
    folder = pathlib.Path(f"{recipe.out or f'runs/{default_name(recipe)}'}-rate")
    console, cache = console or Console(), cache or default_cache()
    train = recipe.train.model_copy(update={"learning_rate": AUTO, "processes": 1})
    recipe = absolute_paths(recipe.model_copy(update={"train": train}))
    with run_guarded(recipe, folder, cache) as stack:
        _, setup = _set_up(recipe, None, folder, console, cache, None, SharedParts(), stack)
        _, found = with_rate(setup, console)
        assert found is not None, "the recipe says auto"
        folder.mkdir(parents=True, exist_ok=True)
        write_search(found, folder)
    tell(console, f"curve     {folder / 'learning_rate.png'}")
    tell(
        console,
        f"use       train.learning_rate={found.rate:g}, or train.learning_rate=auto to search it before every run",
    )
    return found


def _set_up(
    recipe: Recipe, resumed: Resumption | None, folder: pathlib.Path, console: Console, cache: pathlib.Path,
    preflight: PreflightCheck | None, shared: SharedParts, stack: contextlib.ExitStack,
) -> tuple[PartialState, TrainingSetup]:  # fmt: skip
    """The first four steps: everything that a run needs before its folder."""
    # 1. Device, compute type and processes.
    state, device = join_processes(recipe)
    console = heard(state, console)
    dtype, reason = choose_dtype(recipe.model.dtype, device)
    tell(console, f"device    {device}, {str(dtype).removeprefix('torch.')}: {reason}")
    check_limit(recipe, device)
    # 2. Adapter and data, checked before any weights are downloaded.
    if recipe.adapter:
        check_adapter(pathlib.Path(recipe.adapter))
        check_stored(recipe.adapter)
    described = find_checkpoint(recipe.model.path, recipe.model.revision, weights=False)
    config = load_config(described, recipe.model.rope_scaling)
    # `prepare_run` checks this too, for `nybble data check`, but only after it has read and tokenised all rows.
    check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    sizes = sizes_in(config.to_dict(), described.name)
    stack.enter_context(explained_memory(recipe, sizes.shape, folder))

    def prepare() -> PreparedData:
        tokenizer = load_tokenizer(described.folder)
        if preflight is not None and state.is_main_process:
            preflight(config, tokenizer, folder)
        return tokenizer, prepare_data(recipe, tokenizer, config, console, cache, folder)

    with state.local_main_process_first():  # what is cached is cached on each machine
        tokenizer, data = shared.data(recipe, prepare)
    schedule = plan_steps(recipe.train, data.rows, data.validation is not None)
    memory = plan_memory(
        recipe, sizes, data, schedule, device, is_new=resumed is None, others=shared.others_bytes(device)
    )
    if memory is not None:
        tell(console, f"memory    {memory.line}")
        memory.enforce(device)
        recipe = memory.fitted(recipe)
        stack.enter_context(explained_memory(recipe, sizes.shape, folder))  # of the recipe as it runs
    # 3. The base, frozen in 4 bits. One that is streamed or sharded is never on the GPU as a whole: `fuse` moves the rest there.
    place = device if recipe.engine.weights == "device" else torch.device("cpu")
    with state.local_main_process_first(), console.status("loading the base"):
        base = shared.base(recipe, dtype, place, functools.partial(_load_base, recipe, dtype, place, cache, resumed))
    stored = recipe.model.model_copy(
        update={"quantization": base.quantization}
    )  # the checkpoint may have come quantised
    recipe, footprint = recipe.model_copy(update={"model": stored}), measure(base.model)
    print_base(base, footprint, console)
    check_vocabulary(data, base)
    # 4. The adapter.
    set_seed(recipe.train.seed)
    model = resume_adapter(base.model, recipe.adapter) if recipe.adapter else attach_adapter(base.model, recipe.lora)
    trained = print_adapter(model, footprint, console, recipe.adapter)
    fused = fuse_layers(model, recipe, console)
    if recipe.engine.fused and (fused is None or fused.fallen_back):
        memory = None
    setup = TrainingSetup(
        recipe, device, dtype, tokenizer, data, schedule, base, footprint, model, trained, fused, cache, memory
    )
    return state, setup


def _train(
    recipe: Recipe, resumed: Resumption | None, made: frozenset[pathlib.Path] | None, *, folder: pathlib.Path,
    console: Console, cache: pathlib.Path, benchmarks: Benchmarks | None, preflight: PreflightCheck | None,
    parts: SharedParts | None, watch: Watch | None, stack: contextlib.ExitStack,
) -> Run | Halved:  # fmt: skip
    started = time.time()
    if benchmarks is None:
        refuse_missing_benchmarks(recipe)
    # 1 to 4. Processes, data, base and adapter.
    state, setup = _set_up(recipe, resumed, folder, console, cache, preflight, parts or SharedParts(), stack)
    console = heard(state, console)
    # 5. The learning rate, if it is to be found.
    setup, found = with_rate(setup, console)
    # 6. The run folder.
    run = open_run_folder(folder, setup, resumed, state, console, found)
    if resumed is None:
        lock_run(stack, run, "trained")
        made = paths_in(folder)
    first = halved_from(run.start(), run.recipe) if state.is_main_process else None
    # 7. Train.
    print_plan(run, setup.schedule, console)
    earlier = read_mark(resumed.checkpoint) if resumed is not None and resumed.checkpoint is not None else {}
    interruption, used = Interruption(console), ResourceUse(started, earlier)
    with interruption.listening(), cleanup_on_failure(run, state, console, made):
        try:
            recorder = run_trainer(run, setup, resumed, console, benchmarks, interruption, used, watch)
        except torch.OutOfMemoryError:
            if (halved := halve(run, made, first, console)) is None:
                raise
            return halved
    refuse_untrained(run, setup.model, recorder)
    # 8. Summary, loss curve and card.
    if state.is_main_process:
        with cleanup_on_failure(run, state, console, made):
            summary = _finish(run, setup, recorder, used, first)
        print_result(run, summary, console)
    state.wait_for_everyone()
    if parts is not None:
        parts.release(setup)
    return run


def heard(state: PartialState, console: Console) -> Console:
    """The console of the first process; the others print nothing."""
    return console if state.is_main_process else Console(quiet=True)


def _load_base(
    recipe: Recipe, dtype: torch.dtype, place: torch.device, cache: pathlib.Path, resumed: Resumption | None
) -> Base:
    checkpoint = find_checkpoint(recipe.model.path, recipe.model.revision)
    return load_base(checkpoint, recipe.model, dtype, place, cache, base_of_resumed(resumed, checkpoint, cache))


def _finish(run: Run, setup: TrainingSetup, recorder: Recorder, used: ResourceUse, first: int | None) -> Summary:
    """Write what a finished run has; the adapter comes last, since its folder marks the run as finished."""
    summary = summarise(setup, recorder, used, first)
    write_record(run.folder / "summary.json", summary)
    draw_loss(run, run.folder / "loss.png")
    write_card(run, summary)
    save_adapter(run, setup.model)
    return summary
