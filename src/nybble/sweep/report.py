"""What a sweep found: the table, report.html with its pictures, and best.yaml; all written anew after every trial."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from nybble.evaluate.report import plots
from nybble.evaluate.report.page import Plot
from nybble.files.writing import write_text
from nybble.markdown import storable
from nybble.recipe import absolute_paths, dump_recipe
from nybble.sweep.plots import history_plot, importance_plot, parallel_plot
from nybble.sweep.request import SweepRequest, trial_folder
from nybble.sweep.space import Settings
from nybble.sweep.study import TrialResult, best
from nybble.terminal import tell

BEST, REPORT = "best.yaml", "report.html"


def write_report(
    folder: pathlib.Path, request: SweepRequest, results: Sequence[TrialResult], importance: Mapping[str, float]
) -> None:
    """Write best.yaml, report.html and its pictures.

    Args:
        folder: of the sweep.
        request: what was asked for.
        results: the trials that have ended.
        importance: the share of each option in how much the loss varied.
    """
    kept = best(results)
    if kept is not None:
        recipe = absolute_paths(request.searched.recipe(kept.settings)).model_copy(update={"out": None})
        write_text(folder / BEST, dump_recipe(recipe))
    drawn = [
        ("history", "Held-out loss by trial", history_plot(results)),
        ("parallel", "Settings and loss", parallel_plot(results, request.searched.space)),
        ("importance", "What mattered", importance_plot(importance)),
    ]
    pictures = [Plot(name, title, draw) for name, title, draw in drawn if draw]
    (folder / "report").mkdir(exist_ok=True)
    for picture in pictures:
        plots.png(picture.draw, folder / "report" / f"{picture.name}.png")
    template = _environment().get_template(f"{REPORT}.jinja")
    write_text(folder / REPORT, storable(template.render(_view(folder, request, results, pictures))))


def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(lambda file: (resources.files(__package__) / file).read_text(encoding="utf-8")),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _view(
    folder: pathlib.Path, request: SweepRequest, results: Sequence[TrialResult], pictures: Sequence[Plot]
) -> dict[str, object]:
    kept = best(results)
    recipe = request.recipe
    return {
        "name": folder.name,
        "best": kept,
        "command": command(folder),
        "facts": [
            ("base", recipe.model.path),
            ("data", str(recipe.data.path)),
            ("trials", f"{sum(each.outcome != 'killed' for each in results)} of {request.wanted}"),
            *((key, str(each)) for key, each in request.searched.space.items()),
        ],
        "columns": [*request.searched.space, "Held-out loss", "Outcome", "Seconds"],
        "rows": [_row(each, request) for each in ranked(results)],
        "plots": pictures,
    }


def _row(each: TrialResult, request: SweepRequest) -> dict[str, object]:
    cells = [each.settings.get(key, "") for key in request.searched.space]
    return {
        "name": f"{each.number:03}",
        "cells": [
            *cells,
            _loss(each),
            f"{each.outcome}: {each.why}" if each.why else each.outcome,
            f"{each.seconds:,.0f}",
        ],
    }


def _loss(each: TrialResult) -> str:
    return "" if each.loss is None else f"{each.loss:.4f}"


def ranked(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Complete trials by their loss, then pruned ones, then those that failed; killed ones were tried again."""
    order = ("complete", "pruned", "failed")
    shown = [each for each in results if each.outcome in order]
    return sorted(shown, key=lambda each: (order.index(each.outcome), each.loss or 0.0, each.number))


def command(folder: pathlib.Path) -> str:
    """The command that trains the best recipe."""
    return f"nybble train -c {shlex.quote(str(folder / BEST))}"


def print_table(request: SweepRequest, results: Sequence[TrialResult], console: Console) -> None:
    """Print all trials, the best first, and what to do next."""
    table = Table("trial", *request.searched.space, "held-out loss", "outcome", "s", box=None, padding=(0, 2, 0, 0))
    for each in ranked(results):
        cells = [each.settings.get(key, "") for key in request.searched.space]
        table.add_row(f"{each.number:03}", *cells, _loss(each), each.outcome, f"{each.seconds:,.0f}")
    console.print(table)
    tell(console, f"report    {request.folder / REPORT}")
    kept = best(results)
    if kept is None:
        tell(console, "best      no trial ended well", "yellow")
        return
    settings = " ".join(f"{key}={text}" for key, text in kept.settings.items())
    tell(
        console, f"best      {settings}: held-out loss {kept.loss:.4f}, in {trial_folder(request.folder, kept.number)}"
    )
    tell(console, f"          to train it again: {command(request.folder)}")


def trial_line(number: int, settings: Settings, text: str) -> str:
    """A line about a trial."""
    shown = "".join(f"  {key}={value}" for key, value in settings.items())
    return f"trial {number:03} {text}{shown}"
