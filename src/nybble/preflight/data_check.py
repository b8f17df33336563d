"""`nybble data check`: everything that can be known of data before a GPU hour is spent on it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.data import histogram
from nybble.data.batches import Collator, PackedRows
from nybble.data.order import lengths_of
from nybble.data.rows.licences import licences
from nybble.data.rows.sources import Source
from nybble.data.sets.examine import Examined, examine, forms_of, rows_of, sources_of, unfit
from nybble.data.sets.prepare import arranged, of_validation, split
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Counts, Pass
from nybble.data.xray import Rules, inspect
from nybble.errors import DataError, ModelError, NybbleError, RecipeError, TooFewRowsError
from nybble.files.places import check_cache, check_writable, default_cache
from nybble.model.base.checkpoint import check_length, find_checkpoint, read_description, refuse_adapter
from nybble.model.base.load import read_config
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.schedule import plan_steps, steps_text
from nybble.plan.speed import PRODUCTS, estimate
from nybble.recipe import Recipe, absolute_paths
from nybble.terminal import tell

LABEL = 11  # characters before a line's text


def check(
    recipe: Recipe, console: Console, *, picture: pathlib.Path | None = None, cache: pathlib.Path | None = None
) -> bool:
    """Report on the data a recipe names; without a model, on its rows alone.

    Args:
        recipe: of which data, model.path and train are looked at.
        picture: PNG to draw the lengths of rows to.
        cache: folder of tokenised data; None is this user's own.

    Returns:
        Whether `train` would take it.

    Raises:
        DataError: there is nothing to look at.
        PlaceError: the cache or the picture cannot be written.
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
    sources = sources_of(recipe.data)
    forms = forms_of(sources, recipe.data)
    reading = Pass(forms, None, recipe.data)
    with _progress(console, "reading") as (progress, task):
        reading.progress = lambda rows: progress.update(task, completed=rows)
        for _ in reading.conversations(rows_of(sources, recipe.data)):
            pass
    _tell_rows(console, reading.counts, sources, recipe.data.streaming)
    return list(unfit(reading.counts, reading.faults, {}, recipe.data))


def _check_tokens(
    recipe: Recipe, console: Console, picture: pathlib.Path | None, cache: pathlib.Path
) -> list[NybbleError]:
    tokenizer, config = describe(recipe)
    with _progress(console, "reading") as (progress, task):
        examined = examine(recipe.data, tokenizer, cache, lambda rows: progress.update(task, completed=rows))
    _tell_rows(console, examined.counts, examined.sources, recipe.data.streaming)
    refused = list(unfit(examined.counts, examined.faults, examined.lengths, recipe.data))
    faults: list[NybbleError] = [*refused]
    if config is not None:
        faults += _too_long_for(config, recipe)
    held_out, wrong = _validation_rows(recipe, examined, tokenizer, console, cache)
    faults += wrong
    if not examined.lengths:
        return faults
    _tell_lengths(console, examined, recipe)
    if picture is not None:
        histogram.draw(examined.lengths, recipe.data.max_length, picture)
        _line(console, "picture", str(picture))
    if examined.counts.kept:
        found = _tell_batches(console, examined, held_out, recipe, tokenizer, config)
        # Once the refused rows are mended they count again: that the others are too few is not a fault of its own.
        faults += [fault for fault in found if not (refused and isinstance(fault, TooFewRowsError))]
    return faults


def _too_long_for(config: PretrainedConfig, recipe: Recipe) -> list[ModelError]:
    try:
        check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    except ModelError as fault:
        return [fault]
    return []


def _validation_rows(
    recipe: Recipe, examined: Examined, tokenizer: PreTrainedTokenizerBase, console: Console, cache: pathlib.Path
) -> tuple[Dataset | None, list[DataError]]:
    """The rows of the file that data.validation names, where it names one, and what is wrong with it."""
    if not isinstance(recipe.data.validation, str):
        return None, []
    options = of_validation(recipe.data)
    try:
        with _progress(console, "reading validation") as (progress, task):
            found = examine(
                options, tokenizer, cache, lambda rows: progress.update(task, completed=rows), examined.template
            )
    except DataError as fault:
        return None, [fault]
    _line(console, "validation", f"{found.counts.rows:,} rows of {recipe.data.validation}, {found.counts.kept:,} used")
    return found.tokens, list(unfit(found.counts, found.faults, found.lengths, options))


def describe(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PretrainedConfig | None]:
    """Tokenizer and configuration of the model; a folder may hold the tokenizer alone."""
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


def _tell_rows(console: Console, counts: Counts, sources: tuple[Source, ...], streaming: bool) -> None:
    forms = ", ".join(f"{count:,} {form}" for form, count in sorted(counts.forms.items(), key=lambda item: -item[1]))
    where = f" in {len(sources)} sources" if len(sources) > 1 else ""
    where += ", the first of a stream" if streaming else ""
    _line(console, "rows", f"{counts.rows:,}{where}: {forms or 'none that can be read'}")
    for line in licences(sources):
        _line(console, "licence", line)
    _line(console, "duplicates", f"{counts.duplicates:,}" + (", each row used once" if counts.duplicates else ""))
    empty = f"{counts.empty_answers:,}" if counts.empty_answers else "none"
    bad = f"{counts.faulty:,} ({empty} because of an empty answer)" if counts.faulty else "0"
    _line(console, "bad rows", bad, "red" if counts.faulty else "")
    for notice in counts.told():
        _line(console, "notice", notice, "yellow")


def _tell_lengths(console: Console, examined: Examined, recipe: Recipe) -> None:
    counts, lengths, limit = examined.counts, examined.lengths, recipe.data.max_length
    _line(console, "template", f"{examined.template.label}{_bos(examined.template)}")
    share = f"{counts.trained_tokens / counts.tokens:.0%}" if counts.tokens else "none"
    _line(console, "tokens", f"{counts.tokens:,}, {counts.trained_tokens:,} of them trained ({share})")
    marks = [("median", 0.5), ("95% up to", 0.95), ("99% up to", 0.99)]
    told = ", ".join(f"{name} {histogram.quantile(lengths, part):,}" for name, part in marks)
    _line(console, "lengths", f"{min(lengths):,} to {max(lengths):,} tokens; {told}")
    block = "\u2588" if (console.encoding or "").lower().startswith("utf") else "#"
    for line, is_over in histogram.text(lengths, limit, block, console.width - LABEL):
        _line(console, "", line.rstrip(), "red" if is_over else "dim")
    if counts.overlength:
        lost = f", with {_plural(counts.lost_rows, 'row')} left without an answer" if counts.lost_rows else ""
        way = "splitting" if recipe.data.overlength == "split" else "truncating"
        _line(
            console,
            "too long",
            f"{_plural(counts.overlength, 'row')} over data.max_length={limit}; {way} loses "
            f"{counts.lost_answer_tokens:,} answer tokens{lost}",
            "yellow",
        )


def _bos(template: Template) -> str:
    first, more = template.bos_of_turns
    if template.tokenizer.bos_token is None or not first or first > 1:
        return ""
    return f"; {template.tokenizer.bos_token} " + ("at each user turn" if more else "once per row")


def _tell_batches(
    console: Console,
    examined: Examined,
    held_out: Dataset | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
) -> list[NybbleError]:
    """What the collator makes of the rows, and what training on them takes; returns what is wrong."""
    data = recipe.data
    try:
        if isinstance(data.validation, str):
            kept, validation = examined.tokens, held_out
        else:
            kept, validation = split(examined.tokens, data.validation, recipe.train.seed)
        rows = arranged(kept, examined, data, recipe.train.seed)
        collate, rules = Collator(tokenizer.pad_token_id, recipe.engine.fused), Rules(examined.template, data.train_on)
        with _progress(console, "checking", len(rows)) as (progress, task):
            for part in (rows, validation):
                if part is not None:
                    inspect(part, collate, rules, lambda seen: progress.update(task, completed=seen))
    except DataError as fault:
        return [fault]
    bos = ", BOS is in place" if _bos(examined.template) else ""
    ends = tokenizer.convert_ids_to_tokens(sorted(examined.template.ends))
    _line(
        console,
        "batches",
        f"checked as in training: every answer ends with a trained {' or '.join(ends)}{bos}",
    )
    if isinstance(rows, PackedRows):
        filled = sum(rows.samples.select_columns("length")[:]["length"]) / (len(rows) * data.max_length)
        _line(
            console,
            "packing",
            f"{len(rows.samples):,} rows in {len(rows):,} of {data.max_length:,} tokens, {filled:.1%} full",
        )
    return _tell_steps(console, recipe, rows, validation, config)


def _tell_steps(
    console: Console,
    recipe: Recipe,
    rows: Dataset | PackedRows,
    validation: Dataset | None,
    config: PretrainedConfig | None,
) -> list[NybbleError]:
    train = recipe.train
    try:
        schedule = plan_steps(train, None if recipe.data.streaming else len(rows), validation is not None)
    except (DataError, RecipeError) as fault:
        return [fault]
    batch = train.micro_batch * train.accumulation * train.processes
    tokens = schedule.steps * batch * float(lengths_of(rows).mean())
    _line(console, "training", f"{steps_text(schedule.steps, train)}, about {_rounded(tokens)} tokens")
    if schedule.notice:
        _line(console, "", schedule.notice, "yellow")
    if config is not None:
        held_out = 0.0 if validation is None else float(lengths_of(validation).sum())
        # Before the first step too; an evaluation goes forward only.
        tokens += held_out * (schedule.evaluations_after(0) + 1) / PRODUCTS
        _tell_time(console, recipe, tokens, config)
    return []


def _tell_time(console: Console, recipe: Recipe, tokens: float, config: PretrainedConfig) -> None:
    device = choose_device(recipe.model.device, 0)
    speed = estimate(config, device, choose_dtype(recipe.model.dtype, device)[0], recipe.train.processes)
    told = f"roughly {_duration(tokens / speed.free)} on this machine's {device.type}"
    if speed.is_busy:
        told += f" when idle, {_duration(tokens / speed.now)} under its current load"
    told += f": {_rounded(speed.free)} tokens/s in training, estimated from matrix products; evaluations"
    _line(console, "time", f"{told} are included, sample answers and benchmarks are not")


def _rounded(number: float) -> str:
    """Two digits that count: more would claim what is not known."""
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
def _progress(console: Console, what: str, total: int | None = None) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn(f"{what} {{task.completed:,}} rows"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total)
