"""The memory plan beside what runs reserve: `nybble train` with each row of plan_rows.py, one table and a scatter plot.

    python -m bench.plan list                                   the rows, and what is planned for each; nothing is run
    python -m bench.plan run DIR DATA --json FILE [--rows all|open|held-back] [--at-once 8]
    python -m bench.plan show FILE ... [--plot plan.png]        tables and a plot of files that `run` wrote

DIR has the checkpoints of bench.random_checkpoint. Memory is torch's max_memory_reserved of training, in 1e9 bytes, as
summary.json has it. Rows run side by side while their plans fit on the card together: memory is each process's own, so
speed is not measured here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.plan_rows import COMMON, ROWS, Row
from nybble.plan.known_models import KNOWN
from nybble.plan.placing import Rows, as_written, fastest
from nybble.preflight.plan.card import limit_bytes
from nybble.recipe import load_recipe

TOGETHER = 66e9  # bytes of plans that share a card of 80 GB; each process has 0.5 GB of CUDA's own beside
TIMEOUT = 400
ALLOWED = 0.05


def words_of(row: Row) -> list[str]:
    """A row's recipe."""
    own = row.options.split()
    named = {word.split("=")[0] for word in own}
    return [word for word in COMMON if word.split("=")[0] not in named] + own


def planned_bytes(row: Row) -> int:
    """The plan's peak, as if rows were as long as they may be."""
    recipe = load_recipe(None, ["model.path=m", "data.path=d", *words_of(row)])
    shape, vram = KNOWN[row.model].shape, recipe.train.vram
    limit = limit_bytes(vram, None)
    option = as_written(recipe, shape, None, Rows()) if limit is None else fastest(recipe, shape, limit, Rows())
    assert option is not None, f"{row} does not fit"
    return option.prediction.peak.total


@dataclass
class Run:
    """A row in a process."""

    row: Row
    folder: pathlib.Path
    process: subprocess.Popen[bytes]
    started: float

    def result(self) -> dict[str, Any]:
        """What it reserved, or how it failed."""
        log = (self.folder / "log.txt").read_text(errors="replace")
        found: dict[str, Any] = {"model": self.row.model, "options": self.row.options, "held_back": self.row.held_back}
        found["seconds"] = round(time.monotonic() - self.started, 1)
        if self.process.returncode:
            return {**found, "failed": log[-1500:]}
        summary = json.loads((self.folder / "run" / "summary.json").read_text())
        reserved = {"reserved_gb": summary["peak_memory_gb"]}
        memory = summary.get("memory") or {}
        return {**found, **reserved, "planned_gb": memory.get("predicted_gb"), "moment": memory.get("moment")}


def start(row: Row, models: pathlib.Path, data: pathlib.Path, folder: pathlib.Path) -> Run:
    """Start a row."""
    folder.mkdir()
    words = [f"model.path={models / row.model}", f"data.path={data}", f"out={folder / 'run'}", *words_of(row)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nybble", "train", *words], stdout=log, stderr=subprocess.STDOUT
        )
    return Run(row, folder, process, time.monotonic())


def run(rows: list[Row], models: pathlib.Path, data: pathlib.Path, at_once: int, file: pathlib.Path) -> None:
    """Run rows, the largest first; results are written as they come."""
    waiting = sorted(rows, key=lambda row: planned_bytes(row), reverse=True)
    running: list[Run] = []
    done: list[dict[str, Any]] = []
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": card()}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            taken = sum(planned_bytes(each.row) for each in running)
            for row in list(waiting):
                needed = planned_bytes(row)
                if len(running) < at_once and (taken + needed <= TOGETHER or not running):
                    waiting.remove(row)
                    running.append(start(row, models, data, pathlib.Path(folder) / str(len(done) + len(running))))
                    taken += needed
            time.sleep(0.2)
            for each in list(running):
                if time.monotonic() - each.started > TIMEOUT:
                    each.process.kill()
                if each.process.poll() is not None:
                    running.remove(each)
                    done.append(each.result())
                    print(json.dumps(done[-1]), flush=True)
                    file.write_text(json.dumps({**about, "rows": done}, indent=1) + "\n")


def card() -> str:
    """The card's name."""
    return str(torch.cuda.get_device_name())


def show(files: list[pathlib.Path], plot: pathlib.Path | None) -> None:
    """Print the tables, those of rows that were held back apart, and draw planned over reserved."""
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    for held_back in (False, True):
        chosen = [row for row in rows if row["held_back"] is held_back and row.get("planned_gb")]
        print(f"\n{'held back' if held_back else 'not held back'}: {len(chosen)}")
        print("| model | options | planned GB | reserved GB | error |\n| --- | --- | --- | --- | --- |")
        for row in chosen:
            print(
                f"| {row['model']} | {row['options']} | {row['planned_gb']:.2f} | {row['reserved_gb']:.2f} | {error(row):+.1%} |"
            )
        if chosen:
            worst = max(abs(error(row)) for row in chosen)
            print(
                f"worst {worst:.1%}; {sum(abs(error(row)) > ALLOWED for row in chosen)} of {len(chosen)} over {ALLOWED:.0%}"
            )
    for row in rows:
        if not row.get("planned_gb"):
            what = f"no plan, reserved {row['reserved_gb']}" if "reserved_gb" in row else f"failed: {row['failed']}"
            print(f"{row['model']} {row['options']}: {what}")
    if plot is not None:
        draw([row for row in rows if row.get("planned_gb")], plot)


def error(row: dict[str, Any]) -> float:
    """How far the plan is off, in shares of what was reserved."""
    return float(row["planned_gb"] / row["reserved_gb"] - 1)


def draw(rows: list[dict[str, Any]], file: pathlib.Path) -> None:
    """A scatter plot with the bounds of 5%."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    ends = (0.8 * min(row["reserved_gb"] for row in rows), 1.25 * max(row["reserved_gb"] for row in rows))
    axes.plot(ends, ends, color="0.4", linewidth=1)
    axes.fill_between(ends, [0.95 * end for end in ends], [1.05 * end for end in ends], color="0.9", label="within 5%")
    for held_back, marker, label in ((False, "o", "open rows"), (True, "D", "held back")):
        chosen = [row for row in rows if row["held_back"] is held_back]
        axes.scatter(
            [row["reserved_gb"] for row in chosen],
            [row["planned_gb"] for row in chosen],
            marker=marker,
            s=28,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel="reserved, GB", ylabel="planned, GB", xlim=ends, ylim=ends)
    ticks = [size for size in (0.5, 1, 2, 4, 8, 16, 32, 64) if ends[0] <= size <= ends[1]]
    axes.set_xticks(ticks, labels=[f"{size:g}" for size in ticks])
    axes.set_yticks(ticks, labels=[f"{size:g}" for size in ticks])
    axes.minorticks_off()
    axes.set_aspect("equal")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "run", "show"])
    parser.add_argument("paths", type=pathlib.Path, nargs="*")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rows", choices=["all", "open", "held-back"], default="all")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--plot", type=pathlib.Path)
    given = parser.parse_intermixed_args()
    rows = [row for row in ROWS if given.rows in ("all", "held-back" if row.held_back else "open")]
    if given.command == "list":
        for row in rows:
            print(f"{row.model:13} {planned_bytes(row) / 1e9:6.2f}  {row.options}")
    elif given.command == "show":
        show(given.paths, given.plot)
    else:
        run(rows, *given.paths, given.at_once, given.json)


if __name__ == "__main__":
    main()
