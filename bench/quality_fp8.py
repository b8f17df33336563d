"""Is QLoRA trained in fp8 as good as in 16 bits? SmolLM2-135M-Instruct, two data sets, five seeds.

    nybble demo --weights MODEL
    python -m bench.quality_fp8 run MODEL DATA_DIR RESULTS.jsonl [--minutes 9] [--side-by-side 6] [--cache DIR]
    python -m bench.quality_fp8 report RESULTS.jsonl [--picture FILE.png]

Runs, pairs, splits and the test are those of bench/quality.py; its docstring defines them. The methods are QLoRA (NF4, all
linear) in 16 bits and in fp8, and fp8 with a part of it in 16 bits or with fast sums. All train at RATE, which
bench/quality.py had chosen for QLoRA on both data sets, and are measured in evaluation mode, so in 16 bits.

The claim, fixed before any result: the held-out loss of fp8-trained adapters is equivalent to that of 16-bit-trained ones within
MARGIN = 0.01 nats per token, on both data sets. Backward's sums in fp8 become fast, as forward's are, if that is equivalent on
both data sets too.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.quality import parsed, read_results, run, say
from bench.quality_report import MARGIN, Results, chosen, difference
from bench.quality_setup import ALL_METHODS, FP8_METHODS, TASKS, Run, Setup

RATE = 0.003
REFERENCE = "qlora"
FIRST = (REFERENCE, "fp8", "fp8-fast")
COLOURS = {"qlora": "#1d5b79", "fp8": "#d1603d", "fp8-down": "#8a6fb0", "fp8-ends": "#5f6b73", "fp8-fast": "#c9a227"}


def runs_left(results: list[dict[str, Any]], setup: Setup) -> tuple[list[Run], int]:
    """Runs that are not done yet, the methods of the claims first."""
    done = {Run(*(row[field.name] for field in dataclasses.fields(Run))) for row in results}
    runs = [
        Run("test", data, method, seed, RATE)
        for methods in (FIRST, tuple(name for name in FP8_METHODS if name not in FIRST))
        for seed in range(1, setup.seeds + 1)
        for data in TASKS
        for method in methods
    ]
    return [run for run in runs if run not in done], 0


def report(results: Results) -> Iterator[str]:
    """The report in Markdown: a table for each data set, and the verdict."""
    for key in ("device", "dtype", "versions", "setup", "side_by_side"):
        yield f"- {key}: {'; '.join(sorted({str(row[key]) for row in results}))}"
    verdicts = []
    for data, task in TASKS.items():
        yield ""
        yield f"### {task.title}"
        yield ""
        yield "| method | seeds | held-out loss, nats per token | minus 16 bits, 90% interval | by seed | verdict |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for method in (REFERENCE, *FP8_METHODS):
            rows = chosen(results, "test", data, method)
            if not rows:
                continue
            losses = [row["loss"] for row in rows]
            found = None if method == REFERENCE else difference(results, data, method, REFERENCE)
            apart = by_seed = verdict = ""
            if found is not None:
                low, high = found.interval
                apart, verdict = f"{found.mean:+.5f} [{low:+.5f}, {high:+.5f}]", found.verdict
                by_seed = ", ".join(f"{value:+.4f}" for value in found.by_seed)
            if method == "fp8":
                verdicts.append(verdict)
            spread = (
                f"{numpy.mean(losses):.4f} ± {numpy.std(losses, ddof=1):.4f}" if len(losses) > 1 else f"{losses[0]:.4f}"
            )
            yield f"| {ALL_METHODS[method].title} | {len(rows)} | {spread} | {apart} | {by_seed} | {verdict} |"
    yield ""
    holds = verdicts == ["equivalent"] * len(TASKS)
    yield f"**The claim (within {MARGIN} nats on both data sets) {'holds' if holds else 'is not shown'}.**"


def draw(results: Results, file: pathlib.Path) -> None:
    """Loss curves of all seeds, and the differences with their intervals."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(2, len(TASKS), height_ratios=(3, 2))
    for column, (data, task) in enumerate(TASKS.items()):
        _draw_curves(grid[0][column], results, data)
        grid[0][column].set_title(f"{task.title}: training loss, nats per token", fontsize=10, loc="left")
        _draw_differences(grid[1][column], results, data)
    figure.savefig(file, dpi=150)


def _draw_curves(axes: Axes, results: Results, data: str) -> None:
    for method in (REFERENCE, "fp8-fast"):
        for row in chosen(results, "test", data, method):
            steps, losses = zip(*row["curve"], strict=True)
            first = row["seed"] == 1
            axes.plot(steps, losses, color=COLOURS[method], alpha=0.7, linewidth=1.2,
                      label=ALL_METHODS[method].title if first else None)  # fmt: skip
    axes.set_xlabel("step", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_differences(axes: Axes, results: Results, data: str) -> None:
    axes.axvspan(-MARGIN, MARGIN, color="#e8eef2")
    axes.axvline(0, color="#5f6b73", linewidth=0.8)
    names = []
    for method in FP8_METHODS:
        found = difference(results, data, method, REFERENCE)
        if found is None:
            continue
        axes.errorbar(found.mean, len(names), xerr=found.half_width, fmt="o", color=COLOURS[method], capsize=3)
        names.append(ALL_METHODS[method].title)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"held-out loss minus 16 bits; shaded: ±{MARGIN}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Parse and run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = parsed(__doc__)
    if given.command == "run":
        run(given, ["questions=0"], runs_left)
        return
    results = read_results(given.results, None)
    say("\n".join(report(results)))
    if given.picture is not None:
        draw(results, given.picture)


if __name__ == "__main__":
    main()
