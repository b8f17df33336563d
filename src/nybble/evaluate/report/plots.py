"""The plots of a report, as SVG in the page's colours or as PNG."""

from __future__ import annotations

import contextlib
import io
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nybble.data.histogram import quantile
from nybble.evaluate.report.wording import by_verdict, scale
from nybble.files.atomic import replacing
from nybble.run.evaluation import ScoreEntry, TaskEntry
from nybble.run.log import MetricsLine

WIDE, NARROW = 8.6, 3.7  # inches of 100 pixels: the widths that fit pages of 1280 and 400 pixels
MAX_POINTS = 400  # of a curve: a page has no more pixels to show them
BASE, TUNED, ACCENT, INK, MUTED, GRID = "#7b8a9a", "#1d5b79", "#c8552f", "#1c2430", "#5b6776", "#e3e7eb"
CURVES = (TUNED, ACCENT, "#5f7d3a", "#86588f", "#9a7416")
NAMES = dict(zip((BASE, TUNED, ACCENT, INK, MUTED, GRID, *CURVES[2:]), (
    "base", "tuned", "accent", "ink", "muted", "grid", "green", "violet", "ochre",
), strict=True))  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "nybble", "text.parse_math": False, "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "figure.dpi": 100,
}  # fmt: skip

Draw = Callable[[float], Figure]
Point = tuple[float, float]


def benchmark_plot(tasks: Sequence[TaskEntry]) -> Draw | None:
    """Base and tuned with their intervals, one line per benchmark; None if no score is a share."""
    drawn = [task for task in by_verdict(tasks) if scale(task).percent]

    def draw(width: float) -> Figure:
        figure, axes = _axes(width, 0.95 + 0.42 * len(drawn))
        for y, task in enumerate(drawn):
            _whisker(axes, task.base, y - 0.14, BASE, "base" if not y else "")
            _whisker(axes, task.tuned, y + 0.14, TUNED, "tuned" if not y else "")
            axes.text(
                1.01, y, scale(task).change(task.difference.mean if task.difference is not None else None), va="center",
                transform=axes.get_yaxis_transform(), color=_shade(task), fontweight="bold",
            )  # fmt: skip
        axes.set_yticks(range(len(drawn)), [_short(task.name) for task in drawn])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_xlabel("percent, with 95% intervals; right: difference in points")
        if width == NARROW:
            axes.set_xlabel("percent; right: difference in points")
        axes.xaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 4))
        axes.grid(axis="x", color=GRID)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.4)
        return figure

    return draw if drawn else None


def loss_plot(metrics: Sequence[MetricsLine]) -> Draw | None:
    """Training loss, each step and its running mean, and validation loss."""
    steps = _finite((line.step, line.loss) for line in metrics)
    validation = _finite((line.step, line.eval_loss) for line in metrics)
    unit = "loss" if any(line.is_of_preferences for line in metrics) else "nats per token"

    def draw(width: float) -> Figure:
        figure, axes = _axes(width, 3.0)
        if steps:
            axes.plot(*zip(*_thinned(steps), strict=True), color=BASE, linewidth=0.8, alpha=0.6, label="each step")
            smooth = _thinned(_running_mean(steps))
            axes.plot(*zip(*smooth, strict=True), color=TUNED, linewidth=1.8, label="running mean")
        if validation:
            label = f"validation, best {min(loss for _, loss in validation):.3f}"
            axes.plot(*zip(*validation, strict=True), color=ACCENT, marker="o", ms=4, linewidth=1.8, label=label)
        axes.set(xlabel="step", ylabel=unit)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=GRID)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3 if width == WIDE else 1, borderaxespad=0.2)
        return figure

    return draw if steps or validation else None


def score_plot(metrics: Sequence[MetricsLine]) -> Draw | None:
    """Scores of the tasks that were run during training."""
    names = sorted({name for line in metrics for name in line.scores})
    series = {name: _finite((line.step, line.scores.get(name)) for line in metrics) for name in names}
    curves = {name: points for name, points in series.items() if len(points) > 1}

    def draw(width: float) -> Figure:
        columns = 3 if width == WIDE else 1
        figure, axes = _axes(width, 3.0 + 0.2 * (math.ceil(len(curves) / columns) - 1))
        for number, (name, points) in enumerate(curves.items()):
            dash = ("-", "--", ":")[number // len(CURVES) % 3]
            colour = CURVES[number % len(CURVES)]
            axes.plot(*zip(*points, strict=True), dash, color=colour, marker="o", ms=3.5, label=_short(name, 40))
        axes.set(xlabel="step", ylabel="score")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=GRID)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
        return figure

    return draw if curves else None


def length_plot(lengths: Mapping[int, int], limit: int | None) -> Draw | None:
    """Lengths of the training rows, with the limit if it is near."""
    longest = max(lengths, default=0)
    near = limit if limit is not None and limit < 2 * longest else None

    def draw(width: float) -> Figure:
        figure, axes = _axes(width, 2.6)
        edge = max(quantile(lengths, 0.995), near or 0, 1) * 1.05
        bins = 60 if width == WIDE else 30
        axes.hist(list(lengths), weights=list(lengths.values()), bins=bins, range=(0, edge), color=TUNED)
        if near is not None:
            axes.axvline(near, color=ACCENT, linewidth=1.5, label=f"data.max_length={near:,}")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        axes.set(xlabel="tokens per row", ylabel="rows", xlim=(0, edge))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        return figure

    return draw if longest else None


def svg(draw: Draw, width: float, prefix: str) -> str:
    """A plot as SVG for a page: it uses the page's colours, and its ids start with `prefix`."""
    stream = io.StringIO()
    with _style():
        draw(width).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"|(?<=<svg)[^>]*?(?=\sviewBox)|\sversion="1.1"', "", text)
    text = re.sub(r'\bid="|(?<=href=")#|(?<=url\()#', lambda match: f"{match[0]}{prefix}-", text)
    for colour, name in NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def png(draw: Draw, file: pathlib.Path) -> None:
    """A plot as a PNG file, for paper and for pages without style."""
    with _style(), replacing(file) as temporary:
        draw(WIDE).savefig(temporary, format="png", dpi=160, facecolor="white")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The style of the report; warnings about letters without a font are suppressed."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _whisker(axes: Axes, score: ScoreEntry, y: float, colour: str, label: str) -> None:
    if score.mean is None:
        return
    if score.interval and all(map(math.isfinite, score.interval)):
        axes.plot([100 * end for end in score.interval], [y, y], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot([100 * score.mean], [y], "o", color=colour, ms=6, linestyle="none", label=label or None)


def _shade(task: TaskEntry) -> str:
    return {"worse": ACCENT, "better": TUNED}.get(task.verdict or "", MUTED)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _finite(points: Iterable[tuple[int, float | str | None]]) -> list[Point]:
    """The finite points; a loss that is not finite is recorded as text."""
    return [(step, value) for step, value in points if isinstance(value, float) and math.isfinite(value)]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean of each point and its neighbours, 1/20 of the curve in total, fewer at the ends."""
    reach = max(len(points) // 40, 1)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smooth = []
    for index, (step, _) in enumerate(points):
        first, end = max(index - reach, 0), min(index + reach + 1, len(points))
        smooth.append((step, (sums[end] - sums[first]) / (end - first)))
    return smooth


def _thinned(points: Sequence[Point]) -> list[Point]:
    """A long curve reduced to the least and the greatest point of each stretch, so that no peak is lost."""
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    if stretch <= 2:
        return list(points)
    thinned = []
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        thinned += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return thinned
