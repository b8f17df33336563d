"""What a run prints on the terminal; each line starts with a label of its subject."""

from __future__ import annotations

from peft import PeftModel
from rich.console import Console

from nybble.data.sets.prepare import Prepared
from nybble.data.sets.stream import StreamedRows
from nybble.engine.fusion import Fusion
from nybble.model.adapter.updates import targets_of, updates_of
from nybble.model.base.load import Base, Footprint
from nybble.plan.schedule import Schedule, steps_text
from nybble.recipe import DataOptions
from nybble.run.folder import Run
from nybble.run.summary import MemorySummary, Summary
from nybble.terminal import bytes_text, tell


def print_data(console: Console, data: Prepared, options: DataOptions, seconds: float) -> None:
    """Print rows, template, tokens, and what was dropped."""
    counts = data.counts
    forms = ", ".join(f"{count:,} {form}" if len(counts.forms) > 1 else form for form, count in counts.forms.items())
    how = "from the cache" if data.cached else f"tokenised in {seconds:.1f} s"
    tell(
        console,
        f"data      {counts.rows:,} rows ({forms}), template {data.template.label}, {counts.tokens:,} tokens, "
        f"{counts.trained_tokens:,} of them trained; {how}",
    )
    lost = [f"{counts.faulty:,} bad rows"] if counts.faulty else []
    lost += [f"{counts.duplicates:,} duplicates"] if counts.duplicates else []
    if counts.overlength:
        verb = {"truncate": "truncated to", "split": "split into pieces of"}.get(
            options.overlength, "dropped as longer than"
        )
        lost.append(f"{counts.overlength:,} rows {verb} {options.max_length} tokens")
    if lost:
        tell(console, f"          {', '.join(lost)}")
    for notice in counts.notice_lines():
        tell(console, f"          {notice}")
    if isinstance(data.train, StreamedRows):
        count = 0 if data.validation is None else len(data.validation)
        tell(console, f"          these are the first rows of a stream; {count:,} held out")
        return
    packed = f" packed into {len(data.train):,}" if options.packing else ""
    held_out = f", {len(data.validation):,} held out" if data.validation is not None else ", none held out"
    tell(console, f"          {data.train_samples:,} rows to train on{packed}{held_out}")


def print_base(base: Base, size: Footprint, console: Console) -> None:
    """Print name, size and storage of the base."""
    for notice in base.notices:
        tell(console, f"base      {notice}")
    cached = ", from the cache" if base.from_cache else ""
    tell(
        console,
        f"base      {base.checkpoint.name}: {size.parameters / 1e6:,.1f} M parameters, "
        f"{size.quantized / size.parameters:.0%} of them in {base.quantization}; {bytes_text(size.bytes)} in memory "
        f"({bytes_text(2 * size.parameters)} in 16 bits){cached}",
    )


def print_adapter(model: PeftModel, size: Footprint, console: Console, stored: str | None = None) -> int:
    """Print what is trained, and the stored adapter that it starts from; returns the number of trained parameters."""
    config = model.peft_config["default"]
    trained: int = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tell(
        console,
        f"adapter   r {config.r}, alpha {config.lora_alpha:g} on {', '.join(targets_of(model))}: "
        f"{trained:,} trained parameters, {trained / (size.parameters + trained):.2%} of all",
    )
    if stored is not None:
        updates = updates_of(model, folder=stored)
        tell(console, f"          from {stored}: {updates}", "yellow" if updates.is_odd else "")
    return trained


def print_engine(console: Console, fusion: Fusion | None, reason: str) -> None:
    """Print which layers are fused, with which kernels, and why others are not."""
    lines = fusion.describe().splitlines() if fusion is not None else [f"Transformers computes the layers: {reason}"]
    for index, line in enumerate(lines):
        tell(console, f"{'engine' if index == 0 else '':<10}{line}")


def print_plan(run: Run, schedule: Schedule, console: Console) -> None:
    """Print the run folder and the number of steps."""
    tell(console, f"run       {run.folder}: {steps_text(schedule.steps, run.recipe.train)}")
    if schedule.notice:
        tell(console, f"          {schedule.notice}")


def print_result(run: Run, summary: Summary, console: Console) -> None:
    """Print loss, speed, memory, and the next command."""
    if validation := summary.validation_loss:
        tell(console, f"result    validation loss {validation.before:.4f} -> {validation.kept:.4f}")
    tell(
        console,
        f"          {summary.tokens_per_second:,.0f} tokens/s in training, peak memory {summary.peak_memory_gb:.2f} GB, "
        f"{summary.seconds:,.0f} s in total",
    )
    if summary.memory is not None:
        tell(console, f"          {memory_text(summary.memory)}")
    tell(console, f"done      {run.folder}; talk to it: nybble chat {run.folder}")


def memory_text(memory: MemorySummary) -> str:
    """What was reserved on the GPU beside what was planned."""
    error = memory.measured_gb / memory.predicted_gb - 1
    text = f"memory: {memory.measured_gb:.2f} GB reserved, {memory.predicted_gb:.2f} GB planned ({error:+.1%})"
    if memory.exceeded_by:
        return f"{text}; more than planned, most likely in {memory.exceeded_by}: please report this line"
    return text
