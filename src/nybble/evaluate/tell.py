"""An evaluation's progress and results on the terminal."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nybble.terminal import tell

COLOURS = {"worse": "red", "better": "green"}
ORDER = {verdict: place for place, verdict in enumerate(COLOURS)}


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes when it is full; yields what tells it how much is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def tell_results(results: Mapping[str, Any], folder: pathlib.Path, console: Console) -> None:
    """A table of what was compared, worse first, and where the report is; it fits 80 columns."""
    rows = [(task["name"], task["rows"], task) for task in results["tasks"]]
    if held_out := results.get("held_out"):
        flat = {who: {"mean": held_out[who]["loss"]} for who in ("base", "tuned")}
        rows.insert(0, ("held-out loss", held_out["rows"], {**held_out, **flat}))
    generation = results.get("generation") or {"metrics": [], "rows": 0}
    rows += [(metric["name"], generation["rows"], metric) for metric in generation["metrics"]]
    table = Table("", "items", "base", "tuned", "difference (95%)", "", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, items, entry in sorted(rows, key=lambda row: ORDER.get(row[2]["verdict"], 2)):
        table.add_row(name, f"{items:,}", *_numbers(entry))
    console.print(table)
    if undecided := [entry for _, _, entry in rows if entry["difference"] and entry["verdict"] not in COLOURS]:
        sized = any(entry["detectable"] is not None for entry in undecided)
        below = " below the size in brackets" if sized else ""
        tell(console, Text(f"not shown: too few items to detect a difference{below}", "dim"), hang=11)
    for line in results["missing"]:
        tell(console, Text.assemble(("not measured", "yellow"), f" {line['task']}: {line['why']}"), hang=13)
    tell(console, f"report    {folder}/report.html")


def _numbers(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    base, tuned = (f"{entry[who]['mean']:.3f}" for who in ("base", "tuned"))
    difference, said = entry["difference"], entry["verdict"]
    if difference is None:
        return base, tuned, "", ""
    interval = difference["interval"]
    shown = f"{difference['mean']:+.3f}" + (f" ({interval[0]:+.3f}, {interval[1]:+.3f})" if interval else "")
    if said in COLOURS:
        return base, tuned, shown, f"[{COLOURS[said]}]{said}[/]"
    size = entry["detectable"]
    return base, tuned, shown, "not shown" + (f" ({size:.3f})" if size is not None else "")
