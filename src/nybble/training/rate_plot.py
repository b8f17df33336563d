"""The record and the picture of a search for the learning rate."""

from __future__ import annotations

import math
import pathlib

from matplotlib.figure import Figure

from nybble.files.atomic import replacing
from nybble.run.rate import FoundRate
from nybble.run.records import write_record


def write_search(found: FoundRate, folder: pathlib.Path) -> None:
    """Write learning_rate.json and learning_rate.png."""
    write_record(folder / "learning_rate.json", found)
    draw_search(found, folder / "learning_rate.png")


def draw_search(found: FoundRate, file: pathlib.Path) -> None:
    """The change of the loss over the rising learning rate, each step and smoothed, with the suggested rate, as PNG."""
    points = [(point.rate, point.change) for point in found.curve if math.isfinite(point.change)]
    smooth = list(zip([point.rate for point in found.curve], found.smoothed, strict=False))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*points, strict=True), ".", color="#9db4c0", label="each step")
    axes.plot(*zip(*smooth, strict=True), color="#1d5b79", linewidth=1.8, label="smoothed")
    axes.axvline(found.rate, color="#d1603d", linewidth=1.8, label=f"suggested: {found.rate:g}")
    low = min(found.smoothed)
    axes.set_ylim(1.3 * low, -0.6 * low)  # what is above has diverged
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss minus the untrained model's (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False, loc="upper left")
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")
