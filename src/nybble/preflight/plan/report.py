"""Prints a plan on a terminal, or as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.plan.known_models import KNOWN
from nybble.plan.placing import Option
from nybble.plan.step import CONTEXT, ITEMS, Moment, host_bytes
from nybble.preflight.plan.make import RunPlan
from nybble.recipe import Recipe
from nybble.recipe.options.section import Options
from nybble.terminal import bytes_text, tell

BAR, WIDE = 16, 80  # characters of the longest bar, and columns from which there is room for bars


def render(plan: RunPlan, console: Console) -> None:
    """Print what is planned, the memory by item and moment, disk, time, and the command."""
    recipe, work = plan.recipe, plan.option.work
    size = f"{_count(plan.sizes.shape.parameters.total)} parameters in {recipe.model.quantization}"
    tell(console, f"model     {recipe.model.path}: {size} ({plan.sizes.source})")
    adapter = f"LoRA r {recipe.lora.r} on {_targets(plan)}, {_count(work.trained)} trained"
    whole = recipe.train.micro_batch * recipe.train.accumulation * recipe.train.processes
    tell(console, f"step      {whole} rows, {recipe.train.micro_batch} at a time: {work.tokens:,} tokens; {adapter}")
    tell(console, f"layers    {placement_text(plan.option)}")
    console.print()
    _table(plan, console)
    console.print()
    _ladder(plan, console)
    _disk_and_time(plan, console)
    _verdict(plan, console)


def one_line(plan: RunPlan) -> str:
    """The plan's memory in one line, for other commands."""
    if plan.limit is None and not plan.ladder:
        return f"on a GPU {bytes_text(plan.option.prediction.peak.total, 1)}; {placement_text(plan.option)}"
    if plan.limit is None:
        lean, full = (bytes_text(plan.ladder[rung].prediction.peak.total, 1) for rung in (0, -1))
        return f"on a GPU {lean} with engine.policy=host, {full} with keep-all, the fastest; auto mixes them to what is free"
    peak = plan.option.prediction.peak
    of = f"{bytes_text(peak.total)} of {bytes_text(plan.limit)} on the GPU, most of it {_largest(peak)}"
    changes = " ".join(f"{name}={value}" for name, value in plan.option.changes.items())
    if plan.verdict == "over":
        return f"{of}: it may not fit; train.vram=auto finds a way that does"
    if plan.verdict == "too large":
        return f"{of}: it does not fit, however lean; take a smaller model"
    return f"{of}, with {changes}" if changes else f"{of}; {placement_text(plan.option)}"


def _largest(moment: Moment) -> str:
    name = max(moment.items, key=lambda item: moment.items[item])
    return f"{name} ({bytes_text(moment.items[name])})"


def as_json(plan: RunPlan) -> str:
    """Everything that `render` shows, in bytes and seconds."""
    option = plan.option
    peak = option.prediction.peak
    return json.dumps(
        {
            "model": plan.recipe.model.path,
            "sizes_from": plan.sizes.source,
            "parameters": plan.sizes.shape.parameters.total,
            "trained_parameters": option.work.trained,
            "tokens_of_micro_batch": option.work.tokens,
            "limit": plan.limit,
            "verdict": plan.verdict,
            "changes": option.changes,
            "policies": list(option.placement.policies),
            "dequantised_layers": option.placement.cached_layers,
            "peak": {"moment": peak.name, "bytes": peak.total},
            "moments": {moment.name: dict(moment.items) for moment in option.prediction.moments},
            "cuda_context": CONTEXT,
            "pinned_host_memory": host_bytes(option.work),
            "disk": {"download": plan.disk.download, "copy": plan.disk.copy, "run": plan.disk.run},
            "tokens_per_second": plan.pace.tokens_per_second if plan.pace else None,
            "basis": plan.pace.basis if plan.pace else None,
            "steps": plan.facts.steps if plan.facts else None,
            "seconds": plan.seconds,
        },
        indent=2,
    )


def placement_text(option: Option) -> str:
    """What the layers keep, in words."""
    if option.work.plain_mask is not None:
        return "computed by Transformers, each once more in its backward (engine.fused=false)"
    runs = [(policy, len(list(group))) for policy, group in groupby(option.placement.policies)]
    kept = ", ".join(f"{count} {policy}" for policy, count in runs)
    cached = option.placement.cached_layers
    return f"{kept} (engine.policy)" + (f"; the weights of {cached} stay dequantised" if cached else "")


def _table(plan: RunPlan, console: Console) -> None:
    moments = plan.option.prediction.moments
    peak = plan.option.prediction.peak
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("GB on the GPU", no_wrap=True)
    for moment in moments:
        style = "bold" if moment is peak else ""
        table.add_column(moment.name, justify="right", style=style, no_wrap=True, min_width=len(moment.name))
    has_bars = console.width >= WIDE
    if has_bars:
        table.add_column("", no_wrap=True)
    names = sorted({name for moment in moments for name in moment.items}, key=ITEMS.index)
    most = max(peak.items.values())
    for name in names:
        bar = "\u2588" * round(BAR * peak.items.get(name, 0) / most)
        numbers = (_gb(moment.items.get(name, 0)) for moment in moments)
        table.add_row(name, *numbers, *([Text(bar, style="cyan")] if has_bars else []))
    table.add_row("in total", *(_gb(moment.total) for moment in moments), style="bold")
    console.print(table)


def _ladder(plan: RunPlan, console: Console) -> None:
    if not plan.ladder:
        return
    leanest = plan.ladder[0]
    texts = [
        f"{bytes_text(option.prediction.peak.total, 1)} {option.placement.policies[0]} ({leanest.cost / option.cost:.2f} x)"
        for option in plan.ladder
    ]
    tell(console, f"memory    by engine.policy, with its speed: {', '.join(texts)}")
    tell(console, "          auto mixes them to what is free; name your card's memory: --vram 12GB", hang=10)


def _disk_and_time(plan: RunPlan, console: Console) -> None:
    disk = plan.disk
    copy = f", {bytes_text(disk.copy, 1)} its quantised copy" if disk.copy else ""
    tell(console, f"disk      {bytes_text(disk.download, 1)} the base{copy}, {bytes_text(disk.run, 1)} the run")
    if pinned := host_bytes(plan.option.work):
        each = f" in each of {processes} processes" if (processes := plan.option.work.processes) > 1 else ""
        tell(console, f"host      {bytes_text(pinned, 1)} of pinned memory for weights{each}")
    if plan.pace is None:
        return
    tell(console, f"speed     about {round(plan.pace.tokens_per_second, -2):,.0f} tokens/s: {plan.pace.basis}")
    if plan.facts is not None and plan.seconds is not None:
        tokens = f"{plan.facts.steps:,} steps of {plan.facts.count:,} rows, {_count(plan.facts.tokens_of_run)} tokens"
        tell(console, f"time      about {_duration(plan.seconds)} in training: {tokens}")


def _verdict(plan: RunPlan, console: Console) -> None:
    peak = plan.option.prediction.peak
    if plan.limit is None:
        tell(
            console,
            f"peak      {bytes_text(peak.total)} in the {peak.name}, and about {bytes_text(CONTEXT, 1)} for CUDA itself",
        )
        return
    of = f"{bytes_text(peak.total)} of {bytes_text(plan.limit)} in the {peak.name}"
    if plan.verdict == "too large":
        tell(console, f"peak      {of}: it does not fit, however lean; take a smaller model", style="bold red")
        return
    if plan.verdict == "shorter":
        tell(console, f"peak      {of}, with shorter rows: as written it does not fit", style="bold yellow")
    else:
        tell(console, f"peak      {of}", style="bold green")
    tell(console, f"run       {command(plan)}")


def command(plan: RunPlan) -> str:
    """The command that trains as planned: with every option that differs from its default."""
    recipe = plan.recipe
    data = recipe.data.path if isinstance(recipe.data.path, str) and recipe.data.path else "DATA"
    known = KNOWN.get(recipe.model.path.lower())
    model = known.hub_id if known is not None else recipe.model.path
    return shlex.join(["nybble", "train", model, data, *_differences(recipe, Recipe(), "")])


def _differences(options: Options, default: Options, prefix: str) -> Iterator[str]:
    """The options that differ from their defaults, as words of a command."""
    for name in type(options).model_fields:
        value, usual = getattr(options, name), getattr(default, name)
        if isinstance(value, Options):
            yield from _differences(value, usual, f"{prefix}{name}.")
        elif value != usual and f"{prefix}{name}" not in ("model.path", "data.path"):
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000)
            plain = text.strip().removesuffix("...").strip()  # YAML ends a bare value with a line of three dots
            yield f"{prefix}{name}={plain}"


def _targets(plan: RunPlan) -> str:
    targets: str | Sequence[str] = plan.recipe.lora.targets
    return "all linear layers" if targets == "all-linear" else ", ".join(targets)


def _gb(count: int) -> str:
    return "" if not count else "< 0.01" if count < 5_000_000 else f"{count / 1e9:.2f}"


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
