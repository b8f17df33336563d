"""An evaluation's progress and results on the terminal."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nybble.run.evaluation import Evaluation, HeldOutEntry, MetricEntry, PreferenceEntry, ScoreEntry, TaskEntry
from nybble.terminal import tell

HANG = 17  # characters before the numbers of a benchmark or text
COLOURS = {"worse": "red", "better": "green"}
ORDER = {verdict: rank for rank, verdict in enumerate(COLOURS)}


@dataclass(frozen=True)
class Compared:
    """A row of the table."""

    name: str
    items: int
    base: float | None
    tuned: float | None
    difference: ScoreEntry | None
    verdict: str | None
    detectable: float | None


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that disappears at the end; yields a function that sets how much is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def tell_results(evaluation: Evaluation, folder: pathlib.Path, console: Console) -> None:
    """Print a table of the comparisons, worse first, and the path of the report; it fits 80 columns."""
    rows = _rows(evaluation)
    table = Table("", "items", "base", "tuned", "difference (95%)", "", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in sorted(rows, key=lambda row: ORDER.get(row.verdict or "", len(ORDER))):
        table.add_row(row.name, f"{row.items:,}", *_numbers(row))
    console.print(table)
    if undecided := [row for row in rows if row.difference and row.verdict not in COLOURS]:
        sized = any(row.detectable is not None for row in undecided)
        below = " below the size in brackets" if sized else ""
        tell(console, Text(f"not shown: too few items to detect a difference{below}", "dim"), hang=11)
    for line in evaluation.missing:
        tell(console, Text.assemble(("not measured", "yellow"), f" {line.task}: {line.why}"), hang=13)
    tell(console, f"report    {folder}/report.html")


def preference_lines(entry: PreferenceEntry) -> Iterator[str]:
    """What was found about preferences, by the metric's name."""
    for metric in entry.metrics:
        means = ", ".join(
            f"{name} {score.mean:.3f}"
            for name, score in (("base", metric.base), ("tuned", metric.tuned))
            if score.mean is not None
        )
        yield f"{metric.name}: {means or 'no pairs of unequal length'}"
    if entry.longer_chosen.mean is not None:
        yield f"the longer answer is the chosen one in {entry.longer_chosen.mean:.3f} of the pairs"


def _rows(evaluation: Evaluation) -> list[Compared]:
    """Held-out loss, benchmarks, answers."""
    held_out = evaluation.held_out
    losses = [] if held_out is None else [_loss_row(held_out)]
    asked = evaluation.generation.rows if evaluation.generation is not None else 0
    tasks = [_row(task, task.rows) for task in evaluation.tasks]
    judged = evaluation.preferences
    preferred = [] if judged is None else [_row(metric, judged.rows) for metric in judged.metrics]
    return [*losses, *preferred, *tasks, *(_row(metric, asked) for metric in evaluation.answers)]


def _row(entry: TaskEntry | MetricEntry, items: int | None) -> Compared:
    means = entry.base.mean, entry.tuned.mean
    return Compared(entry.name, items or 0, *means, entry.difference, entry.verdict, entry.detectable)


def _loss_row(held_out: HeldOutEntry) -> Compared:
    losses = held_out.base.loss, held_out.tuned.loss
    items = held_out.rows or 0
    return Compared("held-out loss", items, *losses, held_out.difference, held_out.verdict, held_out.detectable)


def _numbers(row: Compared) -> tuple[str, str, str, str]:
    base, tuned = ("" if mean is None else f"{mean:.3f}" for mean in (row.base, row.tuned))
    if row.difference is None or row.difference.mean is None:
        return base, tuned, "", ""
    interval = row.difference.interval
    shown = f"{row.difference.mean:+.3f}" + (f" ({interval[0]:+.3f}, {interval[1]:+.3f})" if interval else "")
    if row.verdict in COLOURS:
        return base, tuned, shown, f"[{COLOURS[row.verdict]}]{row.verdict}[/]"
    return base, tuned, shown, "not shown" + (f" ({row.detectable:.3f})" if row.detectable is not None else "")
