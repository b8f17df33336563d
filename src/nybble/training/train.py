"""From a recipe to a run folder, as numbered steps."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from rich.console import Console
from transformers import EarlyStoppingCallback, PretrainedConfig, PreTrainedTokenizerBase, PrinterCallback

from nybble.chat.samples import SampleAnswers
from nybble.data.batches import Collator
from nybble.data.text.kept_template import save_template
from nybble.distributed.launcher import rank
from nybble.errors import ModelError, RecipeError, RunError
from nybble.evaluate.curve import TaskScores
from nybble.evaluate.scores import Benchmarks
from nybble.files.places import check_places, default_cache, explained_disk, no_empty_folders, writing
from nybble.model.adapter.lora import attach_adapter, check_stored, resume_adapter
from nybble.model.base.bits import Trained, trained_on
from nybble.model.base.checkpoint import Checkpoint, check_length, find_checkpoint, fingerprint
from nybble.model.base.load import load_base, load_config, measure
from nybble.model.device import choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.objective.likelihood import TOKENS_AT_ONCE, bare, is_plain
from nybble.plan.out_of_memory import explained_memory
from nybble.recipe import Recipe, absolute_paths
from nybble.run.folder import (
    Run,
    check_beginning,
    check_room,
    check_unchanged,
    choose_folder,
    create_run,
    open_run,
    refuse_existing,
    start_record,
    write_json,
)
from nybble.run.marks import check_adapter, read_mark
from nybble.terminal import tell
from nybble.training.announce import tell_adapter, tell_base, tell_plan, tell_result
from nybble.training.callbacks import Guards, Recorder, Spent
from nybble.training.card import draw_loss, write_card
from nybble.training.checkpoints import Resumption, clear_the_way, remove_unfinished, resumption
from nybble.training.ending import foreign_files, made_by_now, refuse_untrained, save_adapter, summarise
from nybble.training.interrupt import Interruption
from nybble.training.preparation import (
    Ready,
    check_vocabulary,
    fuse_layers,
    join_processes,
    prepare_data,
)
from nybble.training.progress import EVALUATING, SAMPLING, SCORING, Work
from nybble.training.trackers import end_tracker, start_tracker
from nybble.training.trainer import QLoraTrainer, training_arguments


def train(
    recipe: Recipe, *, console: Console | None = None, cache: pathlib.Path | None = None,
    benchmarks: Benchmarks | None = None, preflight: Preflight | None = None,
) -> Run:  # fmt: skip
    """Train an adapter as a recipe says; returns the finished run.

    Args:
        recipe: all options.
        console: where progress is told.
        cache: folder of quantised bases and tokenised data; None is this user's own.
        benchmarks: what runs train.eval_tasks, `nybble.evaluate.harness.Harness`; None where there are none.
        preflight: says whether export.to can work, of configuration, tokenizer and run folder; None where nothing is exported.

    Raises:
        NybbleError: whatever is wrong with recipe, data, model or machine; no half-written run stays behind.
        KeyboardInterrupt: at Ctrl-C or SIGTERM, once the step in progress is done and saved; at a second one at once.
    """
    folder, cache = choose_folder(recipe), cache or default_cache()
    refuse_existing(folder)
    with _explained(recipe, folder, cache) as held:
        return _train(absolute_paths(recipe), folder, None, console or Console(), cache, benchmarks, preflight, held)


def resume(
    folder: str | pathlib.Path, *, console: Console | None = None, cache: pathlib.Path | None = None,
    benchmarks: Benchmarks | None = None, preflight: Preflight | None = None,
) -> Run:  # fmt: skip
    """Go on with an interrupted run from its newest whole checkpoint, exactly as it would have gone on.

    Raises:
        RunError: the run is finished or damaged, another process is at it, or recipe, data, base or versions changed since
            it began.
    """
    run = open_run(folder)
    _refuse_finished(run)
    base, cache = run.recipe.model.path, cache or default_cache()
    if os.path.isabs(base) and not os.path.exists(base):
        raise ModelError(
            f"the base of {folder} is missing: there is no folder {base}",
            fix="move it back, or put a link there, ln -s NOW THEN: a run can be resumed only with its own base",
        )
    with _explained(run.recipe, run.folder, cache) as held:
        _lock(held, run, "resumed")
        _refuse_finished(run)  # by a process that held the lock until now
        check_beginning(run)
        resumed = resumption(run)
        return _train(run.recipe, run.folder, resumed, console or Console(), cache, benchmarks, preflight, held)


def _refuse_finished(run: Run) -> None:
    if run.is_bare_adapter or run.adapter.exists():
        raise RunError(
            f"{run.folder} is finished: there is nothing to resume",
            fix=f"nybble chat {run.folder}, or continue from it: nybble train MODEL DATA adapter={run.adapter}",
        )


@contextlib.contextmanager
def _explained(recipe: Recipe, folder: pathlib.Path, cache: pathlib.Path) -> Iterator[contextlib.ExitStack]:
    """Places are tried before anything is loaded, and what they or the GPU lack later is one message.

    What is entered into the stack, the run's lock, is held until the end.
    """
    check_places(folder, cache)
    with (
        explained_memory(recipe),
        explained_disk(folder, cache),
        no_empty_folders(folder),
        contextlib.ExitStack() as held,
    ):
        yield held


def _lock(held: contextlib.ExitStack, run: Run, doing: str) -> None:
    """Hold the lock of a run, of several processes in the first."""
    if not rank():
        held.enter_context(writing(run.folder, doing))


Preflight = Callable[[PretrainedConfig, PreTrainedTokenizerBase, pathlib.Path], None]


def _train(
    recipe: Recipe, folder: pathlib.Path, resumed: Resumption | None, console: Console, cache: pathlib.Path,
    benchmarks: Benchmarks | None, preflight: Preflight | None, held: contextlib.ExitStack,
) -> Run:  # fmt: skip
    began = time.time()
    if recipe.train.eval_tasks and benchmarks is None:
        raise RecipeError(
            f"train.eval_tasks={recipe.train.eval_tasks}: there is no benchmark harness to run them",
            fix="train(recipe, benchmarks=nybble.evaluate.harness.Harness(...)), or nybble train on the command line",
        )
    # 1. Where: device, compute type, this process among how many.
    state, device = join_processes(recipe)
    if not state.is_main_process:
        console = Console(quiet=True)
    dtype, reason = choose_dtype(recipe.model.dtype, device)
    tell(console, f"device    {device}, {str(dtype).removeprefix('torch.')}: {reason}")
    # 2. Adapter and data, checked before any weights are fetched.
    if recipe.adapter:
        check_adapter(pathlib.Path(recipe.adapter))
        check_stored(recipe.adapter)
    described = find_checkpoint(recipe.model.path, recipe.model.revision, weights=False)
    config = load_config(described, recipe.model.rope_scaling)
    check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    tokenizer = load_tokenizer(described.folder)
    if preflight is not None:
        preflight(config, tokenizer, folder)
    with state.main_process_first():
        data, schedule = prepare_data(recipe, tokenizer, config, console, cache, folder)
    # 3. The base, frozen in 4 bits.
    with state.main_process_first(), console.status("loading the base"):
        checkpoint = find_checkpoint(recipe.model.path, recipe.model.revision)
        then = _trained_on(resumed, checkpoint, cache)
        base = load_base(checkpoint, recipe.model, dtype, device, cache, then)
    stored = recipe.model.model_copy(update={"quantization": base.quantization})  # it may have come quantised
    recipe, footprint = recipe.model_copy(update={"model": stored}), measure(base.model)
    tell_base(base, footprint, console)
    check_vocabulary(data, base)
    # 4. The adapter.
    set_seed(recipe.train.seed)
    model = resume_adapter(base.model, recipe.adapter) if recipe.adapter else attach_adapter(base.model, recipe.lora)
    trained = tell_adapter(model, footprint, console, recipe.adapter)
    fused = fuse_layers(model, recipe, console)
    ready = Ready(recipe, device, dtype, tokenizer, data, schedule, base, footprint, model, trained, fused)
    # 5. The run folder.
    run = _open_folder(folder, ready, resumed, state)
    if resumed is None:
        _lock(held, run, "trained")
    made = made_by_now(folder) if resumed is None else None
    # 6. Train.
    tell_plan(run, schedule, console)
    earlier = read_mark(resumed.checkpoint) if resumed is not None and resumed.checkpoint is not None else {}
    interruption, spent = Interruption(console), Spent(began, earlier)
    with interruption.listening(), _leaving_nothing_half_done(run, state, console, made):
        recorder = _run_trainer(run, ready, resumed, console, benchmarks, interruption, spent)
    refuse_untrained(run, model, recorder)
    # 7. What stays: summary, curve and card; last the adapter, whose folder says that the run is finished.
    if state.is_main_process:
        with _leaving_nothing_half_done(run, state, console, made):
            summary = summarise(ready, recorder, spent)
            write_json(folder / "summary.json", summary)
            draw_loss(run, folder / "loss.png")
            write_card(run, summary)
            save_adapter(run, model)
        tell_result(run, summary, console)
    state.wait_for_everyone()
    return run


@contextlib.contextmanager
def _leaving_nothing_half_done(
    run: Run, state: PartialState, console: Console, made: Collection[pathlib.Path] | None
) -> Iterator[None]:
    """A failure before the first whole checkpoint leaves no run folder, unless it holds evidence of what happened, or files of
    others; one after it leaves what can be resumed.

    Args:
        run: the run.
        state: of the processes.
        console: where it is told.
        made: what this very run made in its folder before it trained; None where it did not make the folder.
    """
    whole = False
    try:
        yield
        whole = True
    finally:  # whatever it was: tokenizers raises a plain Exception where a disk is full
        if not whole:
            _tidy(run, state, console, made)


def _tidy(run: Run, state: PartialState, console: Console, made: Collection[pathlib.Path] | None) -> None:
    checkpoint, evidence = run.latest_checkpoint(), any(run.folder.glob("nonfinite-*"))
    if state.is_main_process:
        remove_unfinished(run)
    again = f"nybble train --resume {run.folder}"
    if checkpoint is not None:
        tell(console, f"stopped   {checkpoint} is complete; resume with: {again}")
    elif state.is_main_process and not evidence:
        others = foreign_files(run, made) if made is not None else []
        if made is not None and not others:
            shutil.rmtree(run.folder, ignore_errors=True)
            tell(console, "stopped   before the first checkpoint: nothing of this run was kept")
        else:
            why = f", since it holds {others[0]}, which is not its own" if others else ""
            tell(
                console, f"stopped   before the first checkpoint; {run.folder} stays{why}; start it over with: {again}"
            )


def _trained_on(resumed: Resumption | None, checkpoint: Checkpoint, cache: pathlib.Path) -> Trained | None:
    """What a run that goes on was trained on; None where the weights are others, which `check_unchanged` says with all else."""
    if resumed is None:
        return None
    mark, then = fingerprint(checkpoint, cache, prove=True), trained_on(resumed.run)
    return then if then is not None and then.fingerprint == mark else None


def _open_folder(folder: pathlib.Path, ready: Ready, resumed: Resumption | None, state: PartialState) -> Run:
    bits = ready.base.bits.as_json() if ready.base.bits is not None else None
    start = start_record(ready.recipe, ready.data.fingerprint, ready.base.fingerprint, bits)
    check_room(folder, ready.trained_parameters, ready.recipe.train.keep_checkpoints)
    if resumed is not None:
        check_unchanged(resumed.run, start)
    elif state.is_main_process:
        with create_run(folder, ready.recipe, start) as beginning:
            own, ready.tokenizer.chat_template = ready.tokenizer.chat_template, ready.data.template.source
            ready.tokenizer.save_pretrained(beginning / "tokenizer")
            ready.tokenizer.chat_template = own
            save_template(ready.data.template, beginning / "template.json")
    state.wait_for_everyone()
    return Run(folder, ready.recipe)


def _run_trainer(
    run: Run, ready: Ready, resumed: Resumption | None, console: Console, benchmarks: Benchmarks | None,
    interruption: Interruption, spent: Spent,
) -> Recorder:  # fmt: skip
    recipe, data = ready.recipe, ready.data
    has_validation = data.validation is not None
    fused = ready.fusion is not None and not ready.fusion.fallen_back
    arguments = training_arguments(
        recipe, run.folder, ready.schedule, ready.device, ready.dtype, has_validation,
        checkpointing=recipe.train.gradient_checkpointing and not fused,
    )  # fmt: skip
    checkpoint = resumed.checkpoint if resumed is not None else None
    if resumed is not None:
        arguments.eval_on_start = has_validation and checkpoint is None
        for found in clear_the_way(resumed) if arguments.should_save else ():
            tell(console, f"          {found}", hang=10)
        tell(console, f"          resuming from {checkpoint.name if checkpoint else 'the beginning'}")
    if arguments.should_save and (notice := start_tracker(recipe.tracker, run.folder, recipe.model_dump())):
        tell(console, f"tracker   {notice}")
    trainer = QLoraTrainer(
        model=ready.model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(ready.tokenizer.pad_token_id, flatten=fused),
        processing_class=ready.tokenizer,
    )
    if is_plain(bare(ready.model).get_output_embeddings()):  # short rows fill a batch, as they do for `nybble eval`
        trainer.eval_tokens = min(recipe.train.micro_batch * recipe.data.max_length, TOKENS_AT_ONCE)
    if benchmarks is not None and recipe.train.eval_tasks:
        trainer.task_scores = TaskScores(benchmarks, recipe.train.eval_tasks, ready.model, ready.tokenizer, ready.dtype)
    trainer.remove_callback(PrinterCallback)
    sampler = _sampler(ready)
    occasions = {EVALUATING: has_validation, SCORING: trainer.task_scores is not None, SAMPLING: sampler is not None}
    work = Work(console, ready.schedule, frozenset(what for what, happens in occasions.items() if happens))
    trainer.doing = work.doing
    recorder = Recorder(run, trainer.window, console, work, sampler, recipe.tracker.to)
    trainer.add_callback(recorder)
    trainer.add_callback(Guards(run, trainer.window, spent))
    if recipe.train.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.train.early_stopping))
    trainer.add_callback(interruption)  # the last: what ends a run by itself goes before it
    if ready.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ready.device)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        work.end()
        end_tracker(recipe.tracker.to)
    interruption.raise_if_stopped()
    recorder.steps, recorder.history = trainer.state.global_step, trainer.state.log_history
    is_best = arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is not None
    recorder.kept_step = trainer.state.best_global_step if is_best else recorder.steps
    return recorder


def _sampler(ready: Ready) -> SampleAnswers | None:
    rows, count = ready.data.validation, ready.recipe.train.samples
    if rows is None or not count:
        return None
    return SampleAnswers(ready.model, ready.tokenizer, ready.data.template.end_id, rows, count, ready.dtype)
