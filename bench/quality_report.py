"""Tables, verdict and picture of bench/quality.py, whose docstring defines the test."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.quality_setup import METHODS, TASKS

MARGIN = 0.01  # nats per token, fixed before any result
LEVEL = 0.05  # of each one-sided test
REFERENCE, CLAIMED = "lora", "qlora"
COLOURS = {"lora": "#1d5b79", "qlora": "#d1603d", "qlora-qv": "#8a6fb0", "full": "#5f6b73"}
SHORT = {"lora": "LoRA\n16-bit", "qlora": "QLoRA NF4\nall linear", "qlora-qv": "QLoRA NF4\nq, v", "full": "full\nbf16"}

Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of held-out losses in nats per token, over seeds and rows."""

    mean: float
    error: float
    freedom: float
    by_seed: list[float]

    @property
    def half_width(self) -> float:
        """Half the width of the interval of the two one-sided tests."""
        return 0.0 if self.error == 0 else t_quantile(1 - LEVEL, self.freedom) * self.error

    @property
    def interval(self) -> tuple[float, float]:
        """The interval at confidence 1 - 2 LEVEL."""
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def p(self) -> float:
        """The larger p of the two one-sided tests."""
        return 0.0 if self.error == 0 else 1 - t_share((MARGIN - abs(self.mean)) / self.error, self.freedom)

    @property
    def verdict(self) -> str:
        """equivalent, different, or open."""
        low, high = self.interval
        if low > -MARGIN and high < MARGIN:
            return "equivalent"
        return "different" if low > MARGIN or high < -MARGIN else "open"


def paired(mine: numpy.ndarray, other: numpy.ndarray, tokens: numpy.ndarray) -> Difference:
    """The test that bench/quality.py defines.

    Args:
        mine, other: nats, (seeds, rows).
        tokens: number of trained tokens of each row.
    """
    d_si, rows, total = mine - other, len(tokens), tokens.sum()
    by_seed = d_si.sum(axis=1) / total
    mean = by_seed.mean()
    e_i = (d_si.mean(axis=0) - mean * tokens) * rows / total
    seeds = len(by_seed)
    v_seeds, v_rows = by_seed.var(ddof=1) / seeds, e_i.var(ddof=1) / rows
    if v_seeds + v_rows == 0:
        return Difference(float(mean), 0.0, math.inf, by_seed.tolist())
    freedom = (v_seeds + v_rows) ** 2 / (v_seeds**2 / (seeds - 1) + v_rows**2 / (rows - 1))
    return Difference(float(mean), math.sqrt(v_seeds + v_rows), float(freedom), by_seed.tolist())


def t_share(t: float, freedom: float) -> float:
    """Student's distribution function: with t = sqrt(freedom) tan(a) its density is cos(a) ** (freedom - 1)."""
    angles = numpy.linspace(-math.pi / 2, math.pi / 2, 100_001)
    density = numpy.maximum(numpy.cos(angles), 0) ** (freedom - 1)
    reached = math.atan(t / math.sqrt(freedom))
    parts = (density[1:] + density[:-1]) / 2
    share = numpy.concatenate([[0], parts.cumsum()]) / parts.sum()
    return float(numpy.interp(reached, angles, share))


def t_quantile(share: float, freedom: float) -> float:
    """Quantile of Student's distribution, by bisection."""
    low, high = 0.0, 1e3
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return low


def chosen(results: Results, stage: str, data: str, method: str) -> list[dict[str, Any]]:
    """Runs of one stage, data set and method, sorted by seed and rate."""
    matching = [row for row in results if (row["stage"], row["data"], row["method"]) == (stage, data, method)]
    return sorted(matching, key=lambda row: (row["seed"], row["rate"]))


def difference(results: Results, data: str, mine: str, other: str) -> Difference | None:
    """The difference of two methods over the seeds that both have; None if these are fewer than two."""
    left = {row["seed"]: row for row in chosen(results, "test", data, mine) if row["loss"] is not None}
    right = {row["seed"]: row for row in chosen(results, "test", data, other) if row["loss"] is not None}
    seeds = sorted(left.keys() & right.keys())
    if len(seeds) < 2:
        return None
    for seed in seeds:
        check_pair(left[seed], right[seed])
    nats = [numpy.array([side[seed]["nats"] for seed in seeds]) for side in (left, right)]
    return paired(*nats, numpy.array(left[seeds[0]]["tokens"], dtype=float))


def check_pair(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that two methods with one seed had the same rows in the same order, the same initialisation and test rows."""
    where = f"{one['data']} seed {one['seed']}: {one['method']} and {other['method']}"
    assert one["setup"] == other["setup"], f"{where} differ in their setup"
    assert one["order"] == other["order"], f"{where} were trained on different rows or in a different order"
    assert one["tokens"] == other["tokens"], f"{where} were measured on different rows"
    methods = {one["method"], other["method"]}
    if "full" not in methods:
        key = "init_qv" if "qlora-qv" in methods else "init"
        assert one[key] == other[key], f"{where} began with different adapters"


def report(results: Results) -> str:
    """The report in Markdown: what was run, a table for each data set, the verdict, the rates that were tried."""
    lines = [*_heading(results)]
    for data in TASKS:
        lines += ["", f"### {TASKS[data].title}", "", *_table(results, data)]
    lines += ["", "### The claim", "", *_claim(results), "", "### Rates tried", "", *_rates(results)]
    return "\n".join(lines)


def _heading(results: Results) -> Iterator[str]:
    seen = {
        key: sorted({json.dumps(row[key]) for row in results})
        for key in ("device", "dtype", "versions", "setup", "side_by_side")
    }
    for key, values in seen.items():
        yield f"- {key}: {'; '.join(values)}"
    total = sum(row["seconds"] for row in results)
    yield f"- {len(results)} runs, {total / 60:.0f} minutes of runs that shared a card"


def _table(results: Results, data: str) -> Iterator[str]:
    asks = TASKS[data].asks
    score = " exact match, % |" if asks else ""
    yield f"| method | rate | seeds | held-out loss, nats per token |{score} reserved GB | s per run | loss minus 16-bit LoRA's |"
    yield "| --- " * (8 if asks else 7) + "|"
    for method, title in (("lora", "untrained, 16-bit"), ("qlora", "untrained, NF4")):
        for row in chosen(results, "before", data, method):
            right = f" {100 * numpy.mean(row['right']):.1f} |" if asks else ""
            yield f"| {title} | | | {row['loss']:.4f} |{right} | | |"
    for method, about in METHODS.items():
        rows = chosen(results, "test", data, method)
        if not rows:
            continue
        right = f" {_spread([100 * numpy.mean(row['right']) for row in rows], 1)} |" if asks else ""
        memory = [row["peak_GB"] for row in rows if row["peak_GB"] is not None]
        yield (
            f"| {about.title} | {rows[0]['rate']:g} | {len(rows)} | {_spread(_losses(rows), 4)} |{right} "
            f"{_spread(memory, 2)} | {numpy.mean([row['seconds'] for row in rows]):.0f} | {_apart(results, data, method)} |"
        )


def _losses(rows: Results) -> list[float]:
    return [math.inf if row["loss"] is None else row["loss"] for row in rows]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    if not len(values):
        return ""
    deviation = numpy.std(values, ddof=1) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return f"{numpy.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _apart(results: Results, data: str, method: str) -> str:
    found = None if method == REFERENCE else difference(results, data, method, REFERENCE)
    if found is None:
        return ""
    low, high = found.interval
    return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _claim(results: Results) -> Iterator[str]:
    yield (
        f"Fixed beforehand: the held-out loss of QLoRA (NF4, all linear) is equivalent to 16-bit LoRA's within {MARGIN} nats "
        f"per token (two one-sided t-tests at {LEVEL:.0%} on paired differences, over seeds and rows). Intervals are 90%."
    )
    yield ""
    verdicts = []
    for data, task in TASKS.items():
        found = difference(results, data, CLAIMED, REFERENCE)
        if found is None:
            yield f"- {task.title}: not enough runs yet"
            verdicts.append("open")
            continue
        low, high = found.interval
        verdicts.append(found.verdict)
        yield (
            f"- {task.title}: {found.mean:+.5f} nats, interval [{low:+.5f}, {high:+.5f}], standard error {found.error:.5f} with "
            f"{found.freedom:.1f} degrees of freedom, p = {found.p:.2g}: **{found.verdict}**; by seed "
            + ", ".join(f"{value:+.4f}" for value in found.by_seed)
        )
    yield ""
    if set(verdicts) == {"equivalent"}:
        yield "**The claim holds on both data sets.**"
    else:
        yield f"**The claim is not shown: {', '.join(verdicts)}.**"
    yield "This is shown at 135M parameters, on a base that was rounded to Q4_1 once before, and not at 7B."


def _rates(results: Results) -> Iterator[str]:
    yield "Development loss on the seed with which rates are chosen; * marks the chosen rate."
    yield ""
    yield "| data | method | rate: loss |"
    yield "| --- | --- | --- |"
    for data, task in TASKS.items():
        for method, about in METHODS.items():
            rows = chosen(results, "tune", data, method)
            if rows:
                least = min(_losses(rows))
                tried = [
                    f"{row['rate']:g}: {loss:.4f}{'*' if loss == least else ''}"
                    for row, loss in zip(rows, _losses(rows), strict=True)
                ]
                yield f"| {task.title} | {about.title} | {', '.join(tried)} |"


def draw(results: Results, file: pathlib.Path) -> None:
    """Draw held-out losses by method, the paired difference with its margin, and the rates that were tried."""
    figure = Figure(figsize=(11, 10), dpi=120, layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[1.15, 0.8, 1])
    for column, data in enumerate(TASKS):
        _draw_losses(figure.add_subplot(grid[0, column]), results, data)
        _draw_rates(figure.add_subplot(grid[2, column]), results, data)
    _draw_claim(figure.add_subplot(grid[1, :]), results)
    setup = results[0]["setup"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {setup['steps']} steps of {setup['rows']} rows, paired over seeds", fontsize=13
    )
    figure.savefig(file)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#ececec")
    axes.set_axisbelow(True)


def _draw_losses(axes: Axes, results: Results, data: str) -> None:
    for position, method in enumerate(METHODS):
        rows = [row for row in chosen(results, "test", data, method) if row["loss"] is not None]
        if not rows:
            continue
        losses = [row["loss"] for row in rows]
        across = position + numpy.linspace(-0.12, 0.12, len(losses)) if len(losses) > 1 else [position]
        axes.plot([position - 0.25, position + 0.25], [numpy.mean(losses)] * 2, color=COLOURS[method], linewidth=2)
        axes.scatter(across, losses, color=COLOURS[method], s=30, alpha=0.75)
        axes.annotate(f"{numpy.mean(losses):.4f}", (position + 0.27, numpy.mean(losses)), va="center", fontsize=9)
    axes.set_xticks(range(len(METHODS)), [SHORT[method] for method in METHODS], fontsize=9)
    axes.set_xlim(-0.5, len(METHODS) - 0.1)
    axes.set_ylabel("nats per token")
    _plain(axes, f"{TASKS[data].title}: held-out loss; one dot per seed, line: mean")


def _draw_claim(axes: Axes, results: Results) -> None:
    axes.axvspan(-MARGIN, MARGIN, color="#dcebe2", label=f"margin: ±{MARGIN} nats, fixed beforehand")
    axes.axvline(0, color="#888888", linewidth=1)
    for position, data in enumerate(TASKS):
        found = difference(results, data, CLAIMED, REFERENCE)
        if found is None:
            continue
        axes.errorbar(
            found.mean, position, xerr=found.half_width, color=COLOURS[CLAIMED], fmt="D", capsize=5, linewidth=2,
            label="mean and 90% interval" if not position else None,
        )  # fmt: skip
        axes.scatter(
            found.by_seed, [position - 0.25] * len(found.by_seed), color=COLOURS[CLAIMED], s=22, alpha=0.5,
            label="each seed" if not position else None,
        )  # fmt: skip
        axes.annotate(found.verdict, (found.mean, position + 0.14), ha="center", va="bottom", fontsize=10)
    axes.set_yticks(range(len(TASKS)), [task.title for task in TASKS.values()])
    axes.set_ylim(-0.6, len(TASKS) - 0.4)
    edge = max(1.3 * MARGIN, *(abs(bound) for bound in axes.get_xlim()))
    axes.set_xlim(-edge, edge)
    axes.set_xlabel("nats per token; above 0: QLoRA is worse")
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    _plain(axes, "QLoRA NF4 minus 16-bit LoRA")


def _draw_rates(axes: Axes, results: Results, data: str) -> None:
    bests = []
    for method, about in METHODS.items():
        rows = [row for row in chosen(results, "tune", data, method) if row["loss"] is not None]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["loss"])
        bests.append(best["loss"])
        points = [(row["rate"], row["loss"]) for row in rows]
        axes.plot(*zip(*points, strict=True), color=COLOURS[method], marker="o", markersize=4, label=about.title)
        axes.plot(best["rate"], best["loss"], color=COLOURS[method], marker="*", markersize=13)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="nats per token")
    if bests:  # runs that diverged would flatten the rest
        axes.set_ylim(min(bests) - 0.03, max(bests) + 0.15)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes, f"{TASKS[data].title}: rates tried, development split; star: chosen")
