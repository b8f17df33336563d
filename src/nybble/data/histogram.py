"""Lengths of rows, as numbers and as a picture."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping

from matplotlib.figure import Figure

from nybble.files.atomic import replacing

BINS = 12
BAR = 40  # characters of the longest bar
STEPS = (1, 2, 4, 5, 8)  # times a power of ten: widths that read well


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """The length that `share` of the rows do not exceed."""
    wanted, seen = share * sum(lengths.values()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


def bins(lengths: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(first length, last length, rows) of about a dozen bins; the last holds the longest percent, however long."""
    most = max(quantile(lengths, 0.99), 1)
    power = 10 ** math.floor(math.log10(max(most / BINS, 1)))
    width = next((step * power for step in STEPS if step * power * BINS >= most), 10 * power)
    count = most // width + 1
    found = [0] * (count + 1)
    for length, rows in lengths.items():
        found[min(length // width, count)] += rows
    first = min(min(lengths) // width, count - 1)
    edges = [(n * width, (n + 1) * width - 1, found[n]) for n in range(first, count)]
    return [*edges, (count * width, max(lengths), found[count])] if found[count] else edges


def text(lengths: Mapping[int, int], limit: int, block: str, columns: int = 80) -> Iterator[tuple[str, bool]]:
    """A line a bin of at most `columns` characters, and whether its rows are over `limit` tokens."""
    found = bins(lengths)
    most = max(rows for *_, rows in found)
    width = len(f"{found[-1][1]:,}")
    longest = max(1, min(BAR, columns - 2 * width - 15))
    for first, last, rows in found:
        bar = block * math.ceil(longest * rows / most)
        yield f"{first:>{width},} - {last:>{width},}  {bar:<{longest}} {rows:>9,}", first > limit


def draw(lengths: Mapping[int, int], limit: int, file: pathlib.Path) -> None:
    """The same as PNG, with a line where rows get too long."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    edge = max(quantile(lengths, 0.995), limit if limit < 2 * max(lengths) else 0, 1)
    axes.hist(list(lengths), weights=list(lengths.values()), bins=60, range=(0, edge * 1.05), color="#1d5b79")
    axes.axvline(limit, color="#d1603d", linewidth=1.5, label=f"data.max_length={limit:,}")
    axes.set(
        xlabel="tokens per row",
        ylabel="rows",
        title=f"{sum(lengths.values()):,} rows, the longest {max(lengths):,} tokens",
    )
    axes.set_xlim(0, edge * 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")
