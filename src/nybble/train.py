"""From a recipe to a run folder, as numbered steps."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PretrainedConfig, PreTrainedTokenizerBase, PrinterCallback

from nybble.announce import tell, tell_adapter, tell_base, tell_data, tell_engine, tell_plan, tell_result
from nybble.callbacks import Guards, Recorder, peak_memory
from nybble.data.batches import Collator
from nybble.data.prepare import Prepared, prepare
from nybble.data.template import save_template
from nybble.data.xray import Rules, inspect
from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.fusion import Fusion
from nybble.errors import DeviceError, EngineError, ModelError, NybbleError, RecipeError, RunError
from nybble.evaluate.curve import TaskScores
from nybble.evaluate.perplexity import TOKENS_AT_ONCE, bare, is_plain
from nybble.evaluate.scores import Benchmarks
from nybble.inference.samples import SampleAnswers
from nybble.model.adapter import attach_adapter, check_saved, resume_adapter
from nybble.model.base import Base, Footprint, load_base, load_config, measure
from nybble.model.checkpoint import check_length, find_checkpoint
from nybble.model.device import choose_device, choose_dtype, grow_segments
from nybble.model.tokenizer import load_tokenizer
from nybble.out_of_memory import explained_memory
from nybble.plan.schedule import Schedule, plan_steps
from nybble.recipe import Recipe
from nybble.record import draw_loss, write_card
from nybble.run import (
    CACHE,
    Run,
    check_room,
    check_unchanged,
    choose_folder,
    create_run,
    open_run,
    read_metrics,
    refuse_existing,
    start_record,
    versions,
    write_json,
)
from nybble.trackers import end_tracker, start_tracker
from nybble.trainer import QLoraTrainer, training_arguments


def train(
    recipe: Recipe, *, console: Console | None = None, cache: pathlib.Path = CACHE, benchmarks: Benchmarks | None = None,
    preflight: Preflight | None = None,
) -> Run:  # fmt: skip
    """Train an adapter as a recipe says; returns the finished run.

    Args:
        recipe: all options.
        console: where progress is told.
        cache: folder of quantised bases and tokenised data.
        benchmarks: what runs train.eval_tasks, `nybble.evaluate.harness.Harness`; None where there are none.
        preflight: says whether export.to can work, of configuration, tokenizer and run folder; None where nothing is exported.

    Raises:
        NybbleError: whatever is wrong with recipe, data, model or machine; no half-written run stays behind.
    """
    with explained_memory(recipe):
        return _train(recipe, None, console or Console(), cache, benchmarks, preflight)


def resume(
    folder: str | pathlib.Path, *, console: Console | None = None, cache: pathlib.Path = CACHE,
    benchmarks: Benchmarks | None = None, preflight: Preflight | None = None,
) -> Run:  # fmt: skip
    """Go on with an interrupted run from its newest whole checkpoint, exactly as it would have gone on.

    Raises:
        RunError: the run is finished, or recipe, data, base or versions changed since it began.
    """
    run = open_run(folder)
    if run.is_bare_adapter or run.adapter.exists():
        raise RunError(
            f"{folder} is finished: there is nothing to resume",
            fix=f"nybble chat {folder}, or train on from it: nybble train MODEL DATA adapter={run.adapter}",
        )
    with explained_memory(run.recipe):
        return _train(run.recipe, run, console or Console(), cache, benchmarks, preflight)


Preflight = Callable[[PretrainedConfig, PreTrainedTokenizerBase, pathlib.Path], None]


@dataclass(frozen=True)
class Ready:
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


def _train(
    recipe: Recipe, interrupted: Run | None, console: Console, cache: pathlib.Path, benchmarks: Benchmarks | None,
    preflight: Preflight | None,
) -> Run:  # fmt: skip
    began = time.time()
    if recipe.train.eval_tasks and benchmarks is None:
        raise RecipeError(
            f"train.eval_tasks={recipe.train.eval_tasks}: nothing was given that runs them",
            fix="train(recipe, benchmarks=nybble.evaluate.harness.Harness(...)), or nybble train on the command line",
        )
    # 1. Where: device, compute type, this process among how many.
    state, device = _join_processes(recipe)
    if not state.is_main_process:
        console = Console(quiet=True)
    dtype, reason = choose_dtype(recipe.model.dtype, device)
    tell(console, f"device    {device}, {str(dtype).removeprefix('torch.')}: {reason}")
    folder = interrupted.folder if interrupted else choose_folder(recipe)
    if interrupted is None:
        refuse_existing(folder)
    # 2. Data, checked before any weights are fetched.
    described = find_checkpoint(recipe.model.path, recipe.model.revision, weights=False)
    config = load_config(described, recipe.model.rope_scaling)
    check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    tokenizer = load_tokenizer(described.folder)
    if preflight is not None:
        preflight(config, tokenizer, folder)
    with state.main_process_first():
        data = _prepare(recipe, tokenizer, console, cache)
    schedule = plan_steps(recipe.train, data.rows, data.validation is not None)
    # 3. The base, frozen in 4 bits.
    with state.main_process_first(), console.status("loading the base"):
        base = load_base(find_checkpoint(recipe.model.path, recipe.model.revision), recipe.model, dtype, device, cache)
    stored = recipe.model.model_copy(update={"quantization": base.quantization})  # it may have come quantised
    recipe, footprint = recipe.model_copy(update={"model": stored}), measure(base.model)
    tell_base(base, footprint, console)
    _check_vocabulary(data, base)
    # 4. The adapter.
    set_seed(recipe.train.seed)
    model = resume_adapter(base.model, recipe.adapter) if recipe.adapter else attach_adapter(base.model, recipe.lora)
    trained = tell_adapter(model, footprint, console)
    fused = _fuse(model, recipe, console)
    ready = Ready(recipe, device, dtype, tokenizer, data, schedule, base, footprint, model, trained, fused)
    # 5. The run folder.
    run = _open_folder(folder, ready, interrupted, state)
    # 6. Train.
    tell_plan(run, schedule, console)
    with _leaving_nothing_half_done(run, state, console):
        recorder = _run_trainer(run, ready, interrupted, console, benchmarks)
    # 7. What stays: summary, curve and card; last the adapter, whose folder says that the run is finished.
    if state.is_main_process:
        summary = _summary(ready, recorder, time.time() - began)
        write_json(folder / "summary.json", summary)
        draw_loss(run, folder / "loss.png")
        write_card(run, summary)
        _save_adapter(run, model, recorder.kept_step)
        tell_result(run, summary, console)
    state.wait_for_everyone()
    return run


def _join_processes(recipe: Recipe) -> tuple[PartialState, torch.device]:
    """This process's place; the number of processes is held against what was asked for."""
    asked, running = recipe.train.processes, int(os.environ.get("WORLD_SIZE", "1"))
    if asked != running:
        raise DeviceError(
            f"{asked} processes were asked for and {running} run",
            where=f"train.processes={asked}",
            fix=f"nybble train --processes {asked}, or accelerate launch --multi_gpu --num_processes {asked} "
            f"-m nybble train ... train.processes={asked}",
        )
    device = choose_device(recipe.model.device, int(os.environ.get("LOCAL_RANK", "0")))
    on_cpu = device.type == "cpu"
    # The others wait while the first downloads, quantises and tokenises: NCCL's own 10 minutes are too few for that.
    waiting = {"timeout": datetime.timedelta(hours=6), **({"backend": "gloo"} if on_cpu else {})} if asked > 1 else {}
    if not on_cpu:
        grow_segments()
    state = PartialState(cpu=on_cpu, **waiting)
    assert state.num_processes == asked, "Accelerate sees another number of processes"
    return state, device


def _prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console, cache: pathlib.Path) -> Prepared:
    began = time.perf_counter()
    with console.status("reading the data") as status:
        data = prepare(
            recipe.data,
            tokenizer,
            recipe.train.seed,
            cache,
            lambda rows: status.update(f"reading the data: {rows:,} rows"),
        )
        collate, rules = (
            Collator(tokenizer.pad_token_id, recipe.engine.fused),
            Rules(data.template, recipe.data.train_on),
        )
        for rows in (data.sample, data.validation):
            if rows is not None:
                inspect(rows, collate, rules, lambda seen: status.update(f"checking what is trained: {seen:,} rows"))
    tell_data(console, data, recipe.data, time.perf_counter() - began)
    return data


def _check_vocabulary(data: Prepared, base: Base) -> None:
    rows = base.model.get_input_embeddings().num_embeddings
    if data.counts.highest_id >= rows:
        raise ModelError(
            f"the tokenizer gives token id {data.counts.highest_id}, and the model has embeddings for {rows} only",
            where=str(base.checkpoint.folder),
            fix="take the tokenizer that came with the weights",
        )


def _fuse(model: PeftModel, recipe: Recipe, console: Console) -> Fusion | None:
    """Hand the layers to the engine; a model or adapter that it does not know is trained as Transformers computes it.

    Raises:
        EngineError: the recipe says how the engine should work, and it cannot be had.
    """
    if not recipe.engine.fused:
        tell_engine(console, None, "engine.fused=false")
        return None
    try:
        fuse(model, recipe.engine.policy, embedding=recipe.engine.embedding)
    except EngineError as error:
        if recipe.engine.is_shaped:
            raise
        tell_engine(console, None, error.what)
        return None
    result = fusion(model)
    assert result is not None
    if not result.fused:
        why = result.last.passed[0]
        unfuse(model)
        if recipe.engine.is_shaped:
            raise EngineError(
                f"none of {result.fallen_back} decoder layers can be fused: {why}",
                fix="leave engine.policy and engine.embedding out: the layers are then computed by Transformers",
            )
        tell_engine(console, None, why)
        return None
    result.budget.chunked_loss = True
    tell_engine(console, result, "")
    return result


@contextlib.contextmanager
def _leaving_nothing_half_done(run: Run, state: PartialState, console: Console) -> Iterator[None]:
    """A failure before the first whole checkpoint leaves no run folder, unless it holds evidence of what happened."""
    try:
        yield
    except (NybbleError, OSError, RuntimeError, KeyboardInterrupt):
        checkpoint, evidence = run.latest_checkpoint(), any(run.folder.glob("nonfinite-*"))
        if checkpoint is not None:
            tell(console, f"stopped   {checkpoint} is whole; go on with: nybble train --resume {run.folder}")
        elif state.is_main_process and not evidence:
            shutil.rmtree(run.folder, ignore_errors=True)
            tell(console, "stopped   before the first checkpoint: nothing is left of this run")
        raise


def _open_folder(folder: pathlib.Path, ready: Ready, interrupted: Run | None, state: PartialState) -> Run:
    start = start_record(ready.recipe, ready.data.fingerprint, ready.base.fingerprint)
    check_room(folder, ready.trained_parameters, ready.recipe.train.keep_checkpoints)
    if interrupted is not None:
        check_unchanged(interrupted, start)
    if state.is_main_process:
        run = interrupted or create_run(folder, ready.recipe, start)
        own, ready.tokenizer.chat_template = ready.tokenizer.chat_template, ready.data.template.source
        ready.tokenizer.save_pretrained(run.folder / "tokenizer")
        ready.tokenizer.chat_template = own
        save_template(ready.data.template, run.folder / "template.json")
    state.wait_for_everyone()
    return Run(folder, ready.recipe)


def _run_trainer(
    run: Run, ready: Ready, interrupted: Run | None, console: Console, benchmarks: Benchmarks | None
) -> Recorder:
    recipe, data = ready.recipe, ready.data
    has_validation = data.validation is not None
    fused = ready.fusion is not None and not ready.fusion.fallen_back
    arguments = training_arguments(
        recipe, run.folder, ready.schedule, ready.device, ready.dtype, has_validation,
        checkpointing=recipe.train.gradient_checkpointing and not fused,
    )  # fmt: skip
    checkpoint = interrupted.latest_checkpoint() if interrupted else None
    if interrupted is not None:
        arguments.eval_on_start = has_validation and checkpoint is None
        if arguments.should_save:
            run.drop_after(checkpoint)
        tell(console, f"          going on from {checkpoint.name if checkpoint else 'the beginning'}")
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
    recorder = Recorder(run, trainer.window, console, ready.schedule.steps, _sampler(ready), recipe.tracker.to)
    trainer.add_callback(recorder)
    trainer.add_callback(Guards(run, trainer.window))
    if recipe.train.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.train.early_stopping))
    if ready.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ready.device)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        recorder.progress.stop()
        end_tracker(recipe.tracker.to)
    recorder.steps = trainer.state.global_step
    best = trainer.state.best_global_step if arguments.load_best_model_at_end else None
    recorder.kept_step = best or recorder.steps
    return recorder


def _sampler(ready: Ready) -> SampleAnswers | None:
    rows, count = ready.data.validation, ready.recipe.train.samples
    if rows is None or not count:
        return None
    return SampleAnswers(ready.model, ready.tokenizer, ready.data.template.end_id, rows, count, ready.dtype)


def _save_adapter(run: Run, model: PeftModel, kept_step: int) -> None:
    """Write the adapter of a step beside its place, read it back, and move it there."""
    temporary = run.folder / ".adapter.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    check_saved(model, temporary, learnt=kept_step > 1)
    temporary.rename(run.adapter)


def _summary(ready: Ready, recorder: Recorder, seconds: float) -> dict[str, Any]:
    recipe, data, base = ready.recipe, ready.data, ready.base
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(recorder.run) if "eval_loss" in line}
    on_cuda = ready.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": torch.cuda.get_device_name(ready.device) if on_cuda else "cpu",
        "dtype": str(ready.dtype).removeprefix("torch."),
        "base": {
            "name": base.checkpoint.name,
            "commit": base.checkpoint.commit,
            "fingerprint": base.fingerprint,
            "quantization": base.quantization,
            "parameters": ready.footprint.parameters,
            "bytes": ready.footprint.bytes,
        },
        "data": {
            "path": recipe.data.path,
            "fingerprint": data.fingerprint,
            "template": data.template.name,
            **dataclasses.asdict(data.counts),
        },
        "adapter": {
            "targets": sorted(ready.model.peft_config["default"].target_modules),
            "trainable_parameters": ready.trained_parameters,
        },
        "steps": recorder.steps,
        "processes": recipe.train.processes,
        "train_loss": recorder.loss,
        "validation_loss": {"before": losses[0], "kept": losses[recorder.kept_step]} if losses else None,
        "kept_step": recorder.kept_step,
        "tokens": recorder.tokens,
        "tokens_per_second": round(recorder.tokens_per_second, 1),
        "peak_memory_gb": round(peak_memory(ready.device) / 1e9, 3),
        "seconds": round(seconds, 1),
    }
