"""Which learning rate a curve of rising rates suggests.

The largest rate that a run survives is the one number of such a curve that hardly depends on which rows it saw: below it the loss
falls over decades of rates by amounts that noise hides, above it the adapter is destroyed within a few steps. A good rate is a
small fraction of it (Smith 2015; Bengio 2012, section 3.2: the best rate is often within a factor of two of the largest that does
not diverge, for plain gradient descent). Adam's steps have the size of the rate whatever the gradient, so a whole run at the
largest rate is worse than a few steps at it: hence MARGIN, which docs/benchmarks.md holds against rates that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nybble.errors import TrainingError
from nybble.run.rate import FoundRate, RatePoint

MARGIN = 5.0
WIDTH = 0.1  # decades: the standard deviation of the kernel that smooths the curve
DIGITS = 2  # significant digits of a suggestion: it is not known better


def suggest(points: Sequence[RatePoint]) -> FoundRate:
    """The suggested rate of a curve: the rate at which the adapter is as bad as none, divided by MARGIN.

    Args:
        points: at rising rates, until the loss diverged.

    Raises:
        TrainingError: the loss fell at no rate.
    """
    smooth = smoothed(points)
    lowest = min(range(len(points)), key=smooth.__getitem__, default=0)
    if not points or smooth[lowest] >= 0:
        raise TrainingError(
            "train.learning_rate=auto: the loss fell at no rate, so there is nothing to choose by",
            fix="train.learning_rate=2e-4, and look at the rows: nybble data preview DATA MODEL",
        )
    largest = _break_even(points, smooth, lowest)
    if largest is None:
        rate, why = points[lowest].rate, "the loss was lowest there, and no rate up to {:.2g} destroyed the adapter"
        reason = why.format(points[-1].rate)
    else:
        rate = largest / MARGIN
        reason = (
            f"{largest:.2g} / {MARGIN:g}: {largest:.2g} is the rate above which the adapter was worse than none; "
            f"at {points[lowest].rate:.2g} the loss was {-smooth[lowest]:.2f} lower than without it"
        )
    return FoundRate(rate=float(f"{rate:.{DIGITS}g}"), reason=reason, curve=list(points), smoothed=smooth)


def smoothed(points: Sequence[RatePoint]) -> list[float]:
    """The change of the loss at each rate: the mean over its neighbours, by their distance in decades and their terms.

    A change is counted up to the size of the largest fall: what has diverged would otherwise hide what came before it.
    """
    worst = max([0.0, *(-point.change for point in points)])
    result = []
    for here in points:
        weights = [point.terms * math.exp(-0.5 * (math.log10(point.rate / here.rate) / WIDTH) ** 2) for point in points]
        changes = [min(point.change, worst) for point in points]
        result.append(sum(w * c for w, c in zip(weights, changes, strict=True)) / sum(weights))
    return result


def _break_even(points: Sequence[RatePoint], smooth: Sequence[float], lowest: int) -> float | None:
    """The rate above which the smoothed change is above 0, between two steps on a logarithmic scale; None if it ends below.

    The last crossing after the lowest point and not the first: of 16 rows with few trained tokens one step can undo what the next
    ones learn again (a search on instruct_mix crossed at 0.0046 and at 0.0091).
    """
    if smooth[-1] < 0:
        return None
    for number in reversed(range(lowest, len(points) - 1)):
        here, following = smooth[number], smooth[number + 1]
        if here < 0 <= following:
            share = here / (here - following)
            return points[number].rate * math.pow(points[number + 1].rate / points[number].rate, share)
    return None
