"""The pictures of a sweep: losses in the order of the trials, parallel coordinates, and what mattered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nybble.evaluate.report.plots import ACCENT, BASE, GRID, INK, TUNED, WIDE, Draw
from nybble.sweep.space import Range, Space
from nybble.sweep.study import TrialResult, best

APART = 3  # times as far above the best loss as the median: where pictures end
HIGHER = "higher"
LOSSES = LinearSegmentedColormap.from_list("losses", [TUNED, BASE, ACCENT])


def _ceiling(losses: Sequence[float]) -> float:
    """Where a picture's axis of losses ends: trials that diverged would press all others together."""
    low, middle = min(losses), statistics.median(losses)
    return min(max(losses), low + APART * (middle - low)) if middle > low else max(losses)


def history_plot(results: Sequence[TrialResult]) -> Draw | None:
    """The held-out loss of each trial, and the best so far; None if none has one."""
    measured = [each for each in results if each.loss is not None and math.isfinite(each.loss)]

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 3.0), layout="constrained")
        axes = figure.add_subplot()
        ceiling = _ceiling([each.loss or 0.0 for each in measured])
        for label, marker, colour in (("complete", "o", TUNED), ("pruned", "x", BASE), (HIGHER, "^", BASE)):
            points = [
                (each.number, min(each.loss or 0.0, ceiling))
                for each in measured
                if label == (each.outcome if (each.loss or 0.0) <= ceiling else HIGHER)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, ms=5, label=label)
        whole = [each for each in measured if each.outcome == "complete"]
        least = [min(each.loss or math.inf for each in whole[: n + 1]) for n in range(len(whole))]
        if whole:
            axes.step([each.number for each in whole], least, where="post", color=ACCENT, label="best so far")
        axes.set(xlabel="trial", ylabel="held-out loss")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(axis="y", color=GRID)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4 if width == WIDE else 2, borderaxespad=0.2)
        return figure

    return draw if measured else None


def parallel_plot(results: Sequence[TrialResult], space: Space) -> Draw | None:
    """A line for each trial over one axis for each option and one for the loss; None if fewer than two have a loss."""
    measured = [each for each in results if each.loss is not None and math.isfinite(each.loss)]
    kept = best(results)

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.add_subplot()
        losses = [each.loss or 0.0 for each in measured]
        low, high = min(losses), _ceiling(losses)
        for each, loss in sorted(zip(measured, losses, strict=True), key=lambda pair: -pair[1]):
            heights = [_height(space[key], each.settings[key]) for key in space]
            share = min(1.0, (loss - low) / (high - low)) if high > low else 0.0
            line = 2.6 if each == kept else 1.1
            axes.plot(range(len(space) + 1), [*heights, share], color=LOSSES(share), linewidth=line, alpha=0.9)
        for position, key in enumerate(space):
            _axis(axes, position, [(height, text) for height, text in _marks(space[key], width)])
        more = " or more" if high < max(losses) else ""
        _axis(axes, len(space), [(0.0, f"{low:.4f}"), (1.0, f"{high:.4f}{more}")])
        axes.set_xticks(range(len(space) + 1), [*(key.replace(".", ".\n") for key in space), "held-out\nloss"])
        axes.tick_params(axis="x", labelcolor=INK)
        axes.set(yticks=[], ylim=(-0.05, 1.05), xlim=(-0.15, len(space) + 0.45))
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure

    return draw if len(measured) > 1 else None


def importance_plot(importance: Mapping[str, float]) -> Draw | None:
    """The share of each option in how much the loss varied; None if it is not known."""

    def draw(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.9 + 0.36 * len(importance)), layout="constrained")
        axes = figure.add_subplot()
        shares = [100 * share for share in importance.values()]
        axes.barh(range(len(shares)), shares, color=TUNED, height=0.6)
        for y, share in enumerate(shares):
            axes.text(share, y, f" {share:.0f}%", va="center", color=INK)
        axes.set_yticks(range(len(shares)), list(importance))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set(xlabel="share in the differences between losses, percent", xlim=(0, 112))
        axes.spines["left"].set_visible(False)
        return figure

    return draw if importance else None


def _height(each: object, text: str) -> float:
    """Where a value lies on its axis, from 0 to 1."""
    if isinstance(each, Range):
        scale = math.log if each.is_log else float
        low, high = scale(each.low), scale(each.high)
        return (scale(float(text)) - low) / (high - low)
    texts = _ordered(each.texts)  # type: ignore[attr-defined]
    return texts.index(text) / max(len(texts) - 1, 1)


def _marks(each: object, width: float) -> list[tuple[float, str]]:
    """Values to write beside an axis, with their heights."""
    if isinstance(each, Range):
        middle = math.sqrt(each.low * each.high) if each.is_log else (each.low + each.high) / 2
        return [(_height(each, each.text(value)), each.text(value)) for value in (each.low, middle, each.high)]
    most = 18 if width == WIDE else 8
    texts = _ordered(each.texts)  # type: ignore[attr-defined]
    return [(_height(each, text), text if len(text) <= most else f"{text[: most - 1]}…") for text in texts]


def _ordered(texts: Sequence[str]) -> list[str]:
    """Numbers by size; other values as they were given."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return list(texts)


def _axis(axes: Axes, position: int, marks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(position, color=GRID, linewidth=1.2, zorder=0)
    for height, text in marks:
        axes.text(position + 0.03, height, text, va="center", fontsize=8.5, color=INK, zorder=3)
