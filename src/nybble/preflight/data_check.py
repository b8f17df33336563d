"""`nybble data check`: everything that can be known about data before a GPU hour is spent on it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.data import histogram
from nybble.data.batches import PackedRows
from nybble.data.order import lengths_of
from nybble.data.packing import packed_length
from nybble.data.rows.formats import TARGETS
from nybble.data.rows.licences import licences
from nybble.data.rows.reading import OpenRows
from nybble.data.rows.sources import DataSource
from nybble.data.sets.examine import Examined, faults_of_data
from nybble.data.sets.prepare import Prepared
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Counts, Pass
from nybble.errors import DataError, NybbleError
from nybble.files.paths import check_cache, check_writable, default_cache
from nybble.model.base.checkpoint import find_checkpoint, read_description, refuse_adapter
from nybble.model.base.load import read_config
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.schedule import Schedule, few_steps_notice, steps_text
from nybble.plan.speed import PASSES, estimate
from nybble.plan.step import unplanned
from nybble.preflight.plan.card import find_card, limit_bytes
from nybble.preflight.plan.make import RowFacts, as_stored, make_plan
from nybble.preflight.plan.report import one_line
from nybble.preflight.plan.rows import row_facts
from nybble.preflight.plan.sizes import sizes_in
from nybble.preflight.preparation import Stage, prepare_run
from nybble.recipe import Recipe, absolute_paths
from nybble.terminal import tell

LABEL = 11  # width of the labels, in characters


def check(
    recipe: Recipe, console: Console, *, picture: pathlib.Path | None = None, cache: pathlib.Path | None = None
) -> bool:
    """Report on the data that a recipe names; without a model, on its rows alone.

    Args:
        recipe: its sections data, model, train and engine are used.
        picture: PNG file in which to plot the row lengths.
        cache: folder for tokenised data; None for this user's default cache.

    Returns:
        Whether `train` would accept the data.

    Raises:
        DataError: there is no data to check.
        StorageError: the cache or the picture cannot be written.
    """
    recipe = absolute_paths(recipe)
    if recipe.model.path:
        cache = cache or default_cache()
        check_cache(cache)
        if picture is not None:
            check_writable(picture.parent, "the picture", "--png FILE, in a writable folder")
        faults = _check_tokens(recipe, console, picture, cache)
    elif picture is not None:
        raise DataError(
            "--png needs a model: lengths are counted in its tokens", fix="nybble data check DATA MODEL --png FILE"
        )
    else:
        faults = _check_rows(recipe, console)
    if faults:
        for fault in faults:
            lines = str(fault).splitlines()
            _line(console, "fault", lines[0], "bold red")
            for line in map(str.strip, lines[1:]):
                hang = LABEL + (7 if line.startswith(("fix:", "where:")) else 2)
                tell(console, f"{'':{LABEL}}{line}", hang=hang)
        console.print(Text(f"\nnot ready: fix the {_plural(len(faults), 'problem')} above", style="bold red"))
        return False
    what = "ready to train" if recipe.model.path else "readable; add MODEL to check tokens, masks and lengths too"
    console.print(Text(f"\n{what}", style="bold green"))
    return True


def _check_rows(recipe: Recipe, console: Console) -> list[NybbleError]:
    target = TARGETS[recipe.train.objective]
    with OpenRows(recipe.data, target=target) as rows, _progress(console, "reading") as (progress, task):
        reading = Pass(rows.forms, None, recipe.data, lambda count: progress.update(task, completed=count))
        for _ in reading.conversations(rows.items()):
            pass
    _tell_rows(console, reading.counts, rows.sources, recipe.data.streaming)
    return list(faults_of_data(reading.counts, reading.faults, {}, recipe.data))


def _check_tokens(
    recipe: Recipe, console: Console, picture: pathlib.Path | None, cache: pathlib.Path
) -> list[NybbleError]:
    tokenizer, config = load_tokenizer_and_config(recipe)
    faults: list[NybbleError] = []
    with _progress(console, "reading") as (progress, task):

        def show(stage: Stage, rows: int) -> None:
            progress.update(task, description=stage, completed=rows)

        run = prepare_run(recipe, tokenizer, config, cache, on_fault=faults.append, progress=show)
    _tell_rows(console, run.examined.counts, run.examined.sources, recipe.data.streaming)
    if run.held_out is not None:
        counts = run.held_out.counts
        _line(console, "validation", f"{_plural(counts.rows, 'row')} of {recipe.data.validation}, {counts.kept:,} used")
    if not run.examined.lengths:
        return faults
    _tell_lengths(console, run.examined, recipe)
    if picture is not None:
        histogram.draw(run.examined.lengths, recipe.data.max_length, picture)
        _line(console, "picture", str(picture))
    if run.data is not None:
        _tell_batches(console, run.data, recipe)
        if run.schedule is not None:
            _tell_steps(console, run.data, run.schedule, recipe, config)
            if config is not None:
                _tell_memory(console, recipe, config, row_facts(recipe, run.data, run.schedule))
    return faults


def load_tokenizer_and_config(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PretrainedConfig | None]:
    """The model's tokenizer and configuration; None for the configuration of a folder with only a tokenizer."""
    folder = pathlib.Path(recipe.model.path)
    if not folder.is_dir():
        folder = find_checkpoint(recipe.model.path, recipe.model.revision, weights=False).folder
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "config.json")):
        refuse_adapter(folder)
    tokenizer = load_tokenizer(folder)
    if not (folder / "config.json").exists():
        return tokenizer, None
    read_description(folder)
    return tokenizer, read_config(folder)


def _tell_rows(console: Console, counts: Counts, sources: tuple[DataSource, ...], streaming: bool) -> None:
    forms = ", ".join(f"{count:,} {form}" for form, count in sorted(counts.forms.items(), key=lambda item: -item[1]))
    scope = f" in {len(sources)} sources" if len(sources) > 1 else ""
    scope += ", the first of a stream" if streaming else ""
    _line(console, "rows", f"{counts.rows:,}{scope}: {forms or 'none that can be read'}")
    for line in licences(sources):
        _line(console, "licence", line)
    _line(console, "duplicates", f"{counts.duplicates:,}" + (", each row used once" if counts.duplicates else ""))
    empty = f"{counts.empty_answers:,}" if counts.empty_answers else "none"
    bad = f"{counts.faulty:,} ({empty} because of an empty answer)" if counts.faulty else "0"
    _line(console, "bad rows", bad, "red" if counts.faulty else "")
    for notice in counts.notice_lines():
        _line(console, "notice", notice, "yellow")


def _tell_lengths(console: Console, examined: Examined, recipe: Recipe) -> None:
    counts, lengths, limit = examined.counts, examined.lengths, recipe.data.max_length
    _line(console, "template", f"{examined.template.label}{_bos_text(examined.template)}")
    share = f"{counts.trained_tokens / counts.tokens:.0%}" if counts.tokens else "none"
    _line(console, "tokens", f"{counts.tokens:,}, {counts.trained_tokens:,} of them trained ({share})")
    quantiles = [("median", 0.5), ("95% up to", 0.95), ("99% up to", 0.99)]
    text = ", ".join(f"{name} {histogram.quantile(lengths, part):,}" for name, part in quantiles)
    _line(console, "lengths", f"{min(lengths):,} to {max(lengths):,} tokens; {text}")
    block = "\u2588" if (console.encoding or "").lower().startswith("utf") else "#"
    for line, is_over in histogram.text(lengths, limit, block, console.width - LABEL):
        _line(console, "", line.rstrip(), "red" if is_over else "dim")
    if counts.overlength:
        lost = f", with {_plural(counts.lost_rows, 'row')} left without an answer" if counts.lost_rows else ""
        method = "splitting" if recipe.data.overlength == "split" else "truncating"
        _line(
            console,
            "too long",
            f"{_plural(counts.overlength, 'row')} over data.max_length={limit}; {method} loses "
            f"{counts.lost_answer_tokens:,} answer tokens{lost}",
            "yellow",
        )


def _bos_text(template: Template) -> str:
    """Where the template writes BOS, as an addition to its name; empty if it writes none."""
    first, more = template.bos_of_turns
    if template.tokenizer.bos_token is None or not first or first > 1:
        return ""
    return f"; {template.tokenizer.bos_token} " + ("at each user turn" if more else "once per row")


def _tell_batches(console: Console, data: Prepared, recipe: Recipe) -> None:
    """Report on the collator's batches."""
    bos = ", BOS is in place" if _bos_text(data.template) else ""
    ends = data.template.tokenizer.convert_ids_to_tokens(sorted(data.template.ends))
    _line(console, "batches", f"checked as in training: every answer ends with a trained {' or '.join(ends)}{bos}")
    if isinstance(rows := data.sample, PackedRows):
        length = packed_length(recipe.data.max_length, TARGETS[recipe.train.objective])
        filled = sum(rows.samples.select_columns("length")[:]["length"]) / (len(rows) * length)
        _line(
            console, "packing", f"{len(rows.samples):,} rows in {len(rows):,} of {length:,} tokens, {filled:.1%} full"
        )


def _tell_steps(
    console: Console, data: Prepared, schedule: Schedule, recipe: Recipe, config: PretrainedConfig | None
) -> None:
    """Report how many steps, tokens and how much time training takes."""
    train = recipe.train
    batch = train.micro_batch * train.accumulation * train.processes
    tokens = schedule.steps * batch * float(lengths_of(data.sample).mean())
    _line(console, "training", f"{steps_text(schedule.steps, train)}, about {_rounded(tokens)} tokens")
    for notice in filter(None, (schedule.notice, few_steps_notice(train, schedule.steps))):
        _line(console, "", notice, "yellow")
    if config is not None:
        held_out = 0.0 if data.validation is None else float(lengths_of(data.validation).sum())
        # There is one evaluation before the first step too; an evaluation is a forward pass only.
        tokens += held_out * (schedule.evaluations_after(0) + 1) / PASSES
        _tell_time(console, recipe, tokens, config)


def _tell_time(console: Console, recipe: Recipe, tokens: float, config: PretrainedConfig) -> None:
    device = choose_device(recipe.model.device, 0)
    speed = estimate(config, device, choose_dtype(recipe.model.dtype, device)[0], recipe.train.processes)
    text = f"roughly {_duration(tokens / speed.idle)} on this machine's {device.type}"
    if speed.is_busy:
        text += f" when idle, {_duration(tokens / speed.current)} under its current load"
    text += f": {_rounded(speed.idle)} tokens/s in training, estimated from matrix products; evaluations"
    _line(console, "time", f"{text} are included, sample answers and benchmarks are not")


def _tell_memory(console: Console, recipe: Recipe, config: PretrainedConfig, facts: RowFacts) -> None:
    sizes = sizes_in(config.to_dict(), "")
    if unplanned(as_stored(recipe, sizes.stored)) is not None:
        return
    card, vram = find_card(), recipe.train.vram
    limit = limit_bytes(vram, card)
    plan = make_plan(recipe, sizes, limit=limit, card=card, facts=facts, adapt=vram is not None)
    _line(console, "memory", one_line(plan), "" if plan.verdict == "fits" else "yellow")


def _rounded(number: float) -> str:
    """A number with two significant digits: more would suggest a precision that an estimate does not have."""
    digits = max(len(str(int(number))) - 2, 0)
    return f"{round(number, -digits):,.0f}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    tell(console, f"{label:<{LABEL}}{text}", style, hang=LABEL)


@contextmanager
def _progress(console: Console, what: str) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description} {task.completed:,} rows"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=None)
