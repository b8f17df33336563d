"""How certain a score is, and whether two models' scores on the same items differ.

The difference is tested by the paired bootstrap-t (Efron & Tibshirani 1993, chapter 12.5): items, or whole clusters of them,
are drawn with replacement, and each draw's difference is divided by that draw's own standard error, so that few items and
skewed scores widen the interval as they should; percentile intervals are too narrow there. Two bounds apply where the data are
too few for a bootstrap:

- The interval is never narrower than Student's t: draws from a handful of items are too similar.
- p is at least 2^(1-k), where k items (clusters) differ at all: no test by signs alone can give less. With fewer than six
  no difference can be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy

LEVEL = 0.05
NORMAL = NormalDist().inv_cdf(1 - LEVEL / 2)
POWER = NormalDist().inv_cdf(0.8)
LEAST = 6  # units that differ: the first k with 2^(1-k) under LEVEL
LEAST_EXPECTED = 7.91  # the expected number that gives at least LEAST in 4 of 5 samples (Poisson)
BLOCK = 2**18  # numbers drawn at once: 2 MB, which stay in a core's cache
DRAW_COST = 8  # drawing how often one kind of item occurs costs as much as drawing this many items

Floats = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]
Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (inf if there is only one item or cluster), and its 95% interval."""

    mean: float
    stderr: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class PairedComparison:
    """Base against tuned on the same items.

    Args:
        difference: tuned - base. Its interval contains zero exactly if p is over 0.05.
        p: two-sided p-value for no difference.
        detectable: the smallest true difference that this many items show with 80% power at the 5% level: from the difference
            to the farther end of its interval, + 0.84 standard errors of the paired differences. That is 2.8 standard errors
            where there are many (Miller 2024, Adding Error Bars to Evals). For scores of 0 and 1 at least 7.91 / items: six
            items that differ are needed, and 4 of 5 samples have six where 7.91 are expected. inf where nothing can
            be shown: fewer than six items (clusters), or all differences equal.
    """

    base: Estimate
    tuned: Estimate
    difference: Estimate
    p: float
    detectable: float


@dataclass(frozen=True)
class _Units:
    """The units that are drawn: items or clusters. A mean is the sum of `base` or `tuned` over the sum of `sizes`."""

    sizes: Floats
    base: Floats
    tuned: Floats
    items: int
    binary: bool  # all scores are 0 or 1
    step: float  # what one item of such scores adds to a sum of squares


@dataclass(frozen=True)
class _Mean:
    mean: float
    residuals: Floats  # of each unit, summing to zero
    squares: float  # their sum of squares, by the jackknife where units differ in size

    def stderr(self, units: _Units, more: float = 0.0) -> float:
        count = len(units.sizes)
        if count == 1:
            return math.inf
        return math.sqrt((self.squares + more) * count / (count - 1)) / float(units.sizes.sum())


def compare(
    base: Floats,
    tuned: Floats,
    *,
    clusters: Sequence[int] | Sequence[str] | numpy.ndarray | None = None,
    over: Literal["items", "clusters"] = "items",
    draws: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Whether `tuned` differs from `base` on the same items, by the paired bootstrap-t.

    Means of 0 and 1 get Wilson's interval, with clusters at the number of independent items that has their standard error;
    other means get the bootstrap's. The difference of 0/1 scores is studentised as if one item more differed (Agresti & Min
    2005): if no item or only one differs, there would be no spread to divide by.

    Args:
        base: one score per item, shape (items,).
        tuned: likewise.
        clusters: one label per item, such as MMLU's subject: whole clusters are drawn (Miller 2024).
        over: the mean over items, or the mean of the clusters' means.
        draws: bootstrap resamples.
        seed: the same draws every time.
    """
    base, tuned = numpy.asarray(base, dtype=numpy.float64), numpy.asarray(tuned, dtype=numpy.float64)
    assert base.shape == tuned.shape == (base.size,), "one score per item, of both models"
    assert base.size, "no scores"
    assert numpy.isfinite([base, tuned]).all(), "a score is not a number"
    assert clusters is None or len(clusters) == len(base), "one label per item"
    assert over == "items" or clusters is not None, "a mean over clusters without clusters"
    units = _units(base, tuned, clusters, over)
    means = [_mean(sums, units.sizes) for sums in (units.base, units.tuned, units.tuned - units.base)]
    steps = [0.0, 0.0, units.step]
    resampled = means[2:] if units.binary else means
    ts = _resampled(resampled, steps[-len(resampled) :], units.sizes, draws, numpy.random.default_rng(seed))
    if units.binary:
        first, second = (Estimate(m.mean, m.stderr(units), _wilson(m, units, clusters is not None)) for m in means[:2])
    else:
        first, second = (_bootstrapped(m, units, 0.0, t)[0] for m, t in zip(means[:2], ts[:2], strict=True))
    difference, p, detectable = _tested(means[2], units, ts[-1])
    return PairedComparison(first, second, difference, p, detectable)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: a false claim is as rare over all tasks together as for one."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def verdict(difference: float, p_adjusted: float, higher_is_better: bool = True, level: float = LEVEL) -> Verdict:
    """What a report may claim about a task."""
    if p_adjusted > level or difference == 0:
        return "no difference shown"
    return "better" if (difference > 0) == higher_is_better else "worse"


def _units(
    base: Floats, tuned: Floats, clusters: Sequence[int] | Sequence[str] | numpy.ndarray | None, over: str
) -> _Units:
    binary = bool(numpy.isin(base, (0, 1)).all() and numpy.isin(tuned, (0, 1)).all())
    if clusters is None:
        return _Units(numpy.ones(len(base)), base, tuned, len(base), binary, float(binary))
    _, members = numpy.unique(numpy.asarray(clusters), return_inverse=True)
    sizes = numpy.bincount(members).astype(numpy.float64)
    sums = [numpy.bincount(members, weights=scores).astype(numpy.float64) for scores in (base, tuned)]
    if over == "items":
        return _Units(sizes, sums[0], sums[1], len(base), binary, float(binary))
    step = float(binary) * float((sizes**-2.0).mean())
    return _Units(numpy.ones(len(sizes)), sums[0] / sizes, sums[1] / sizes, len(base), binary, step)


def _mean(sums: Floats, sizes: Floats) -> _Mean:
    mean = float(sums.sum() / sizes.sum())
    residuals = sums - mean * sizes
    if len(sizes) == 1:
        return _Mean(mean, residuals, 0.0)
    # How the mean changes without each unit (Efron & Tibshirani 1993, chapter 11); for units of equal size, the plain sum of
    # squares. With half of the items in 1 of 10 clusters a plain sum gave 9.5% false claims.
    without = residuals * (1 - 1 / len(sizes)) / (1 - sizes / sizes.sum())
    return _Mean(mean, residuals, float(without @ without))


def _resampled(
    means: Sequence[_Mean], steps: Sequence[float], sizes: Floats, draws: int, rng: numpy.random.Generator
) -> list[Floats]:
    """For each mean, its t in each draw, sorted: how far the draw's mean is off, in the draw's own standard errors."""
    count = len(sizes)
    columns = [sizes, sizes**2]
    for mean in means:
        columns += [mean.residuals, mean.residuals * sizes, mean.residuals**2]
    sums = numpy.concatenate(list(_sums(numpy.stack(columns, axis=1), draws, rng)))
    size, size_squares = sums[:, 0], sums[:, 1]
    ts = []
    for n, (mean, step) in enumerate(zip(means, steps, strict=True)):
        off, cross, squares = sums[:, 2 + 3 * n : 5 + 3 * n].T
        shift = off / size
        spread = squares - 2 * shift * cross + shift**2 * size_squares + step
        off = numpy.where(abs(off) > 1e-9 * math.sqrt(mean.squares), off, 0.0)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            t = off / numpy.sqrt(numpy.where(spread > 1e-12 * mean.squares, spread, 0.0) * (count / max(count - 1, 1)))
        # A draw of equal scores (0 / 0 where they are all equal anyway) has no spread: infinitely far off.
        ts.append(numpy.sort(numpy.where(off == 0, 0.0, t)))
    return ts


def _sums(columns: Floats, draws: int, rng: numpy.random.Generator) -> Iterator[Floats]:
    """The columns' sums over units drawn with replacement, one row per draw."""
    count = len(columns)
    kinds, often = numpy.unique(columns, axis=0, return_counts=True)
    if DRAW_COST * len(kinds) <= count:
        yield rng.multinomial(count, often / count, size=draws) @ kinds
        return
    rows = max(1, BLOCK // count)
    for start in range(0, draws, rows):
        block = min(rows, draws - start)
        drawn = rng.integers(0, count, size=(block, count))
        drawn += numpy.arange(block)[:, None] * count
        times = numpy.bincount(drawn.ravel(), minlength=block * count).reshape(block, count)
        yield times.astype(numpy.float64) @ columns


def _bootstrapped(mean: _Mean, units: _Units, step: float, t: Floats) -> tuple[Estimate, float]:
    """The mean with its interval, and the interval's longer side."""
    error = mean.stderr(units, step)
    if math.isinf(error):
        return Estimate(mean.mean, error, (-math.inf, math.inf)), math.inf
    least = _student(len(units.sizes) - 1)
    index = math.ceil((1 - LEVEL / 2) * (len(t) + 1)) - 1
    assert index < len(t), "too few draws for an interval"
    below, above = max(float(t[index]), least), max(float(-t[-1 - index]), least)
    if error == 0:
        return Estimate(mean.mean, 0.0, (mean.mean, mean.mean)), 0.0
    interval = (mean.mean - below * error, mean.mean + above * error)
    return Estimate(mean.mean, mean.stderr(units), interval), max(below, above) * error


def _tested(mean: _Mean, units: _Units, t: Floats) -> tuple[Estimate, float, float]:
    """The difference, its p, and what would have been detectable."""
    estimate, side = _bootstrapped(mean, units, units.step, t)
    error, count = mean.stderr(units, units.step), len(units.sizes)
    differing = int((units.tuned != units.base).sum())
    signs = min(1.0, 2.0 ** (1 - differing))
    if mean.mean == 0 or count == 1:
        p = 1.0
    elif error == 0:
        p = signs
    else:
        reached = abs(mean.mean) / error
        tail = t if mean.mean > 0 else -t[::-1]
        beyond = len(t) - int(numpy.searchsorted(tail, reached * (1 - 1e-9)))
        p = min(1.0, max(2 * (1 + beyond) / (len(t) + 1), _student_p(reached, count - 1), signs))
    if p > LEVEL:
        low, high = estimate.interval
        estimate = Estimate(estimate.mean, estimate.stderr, (min(low, 0.0), max(high, 0.0)))
    if count < LEAST or error == 0:
        return estimate, p, math.inf
    return estimate, p, max(side + POWER * error, LEAST_EXPECTED / units.items if units.binary else 0.0)


def _student(freedom: int) -> float:
    """Student's t at LEVEL, two-sided, by the approximation of `_student_p`; with less than 5 degrees it is too wide."""
    square = (1 - 1 / (4 * freedom)) ** 2 - NORMAL**2 / (2 * freedom)
    return NORMAL / math.sqrt(square) if square > 0 else math.inf


def _student_p(t: float, freedom: int) -> float:
    """Two-sided (Abramowitz & Stegun 1964, 26.7.8); numpy has no Student's t."""
    return math.erfc(t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom)) / math.sqrt(2))


def _wilson(mean: _Mean, units: _Units, clustered: bool) -> tuple[float, float]:
    """Wilson's (1927) interval of a share; clusters count as the independent items that have their standard error."""
    share = min(max(mean.mean, 0.0), 1.0)
    count, z = float(units.items), NORMAL
    if clustered:
        if len(units.sizes) == 1:
            return 0.0, 1.0
        error = mean.stderr(units)
        count = min(count, share * (1 - share) / error**2) if error > 0 else float(len(units.sizes))
        z = _student(len(units.sizes) - 1)
    if math.isinf(z):
        return 0.0, 1.0
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
