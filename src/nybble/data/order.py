"""The order in which rows are trained on, and the batches in which they are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from datasets import Dataset

from nybble.data.batches import PackedRows
from nybble.data.sets.prepare import column

SORTED_STEPS = 50  # their rows are sorted by length together: enough for little padding, few enough to stay random


class GroupedByLength(torch.utils.data.Sampler[int]):
    """A random order in which rows of similar length share a step, longest rows first.

    Padding then wastes little. The step with the most tokens comes first and that with the longest row second, so a run that does
    not fit in memory fails at once, with padding or without. The order depends only on the seed, the epoch
    and the number of rows in a step: an interrupted run continues where it stopped, and a step has the same rows however it is
    split into micro batches and processes.

    The last step of an epoch may have fewer rows. Each process needs as many micro batches, so it is filled with its own rows
    once more, under positions from the number of rows on: these count for nothing (`nybble.data.batches.FilledRows`).

    Args:
        lengths: tokens of each row.
        step: rows of one optimiser step.
        seed: of the order.
        together: rows of one micro batch of each process; a single process need not fill one.
    """

    def __init__(self, lengths: numpy.ndarray, step: int, seed: int, together: int = 1) -> None:
        self.lengths = lengths
        self.step = step
        self.seed = seed
        self.together = together
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Accelerate calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self._missing

    @property
    def _missing(self) -> int:
        return -len(self.lengths) % self.together

    def __iter__(self) -> Iterator[int]:
        generator = numpy.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        size = SORTED_STEPS * self.step
        groups = [order[start:][:size] for start in range(0, len(order), size)]
        order = numpy.concatenate([group[numpy.argsort(-self.lengths[group], kind="stable")] for group in groups])
        full = len(order) // self.step * self.step
        steps = generator.permutation(order[:full].reshape(-1, self.step))
        _bring_largest(steps, self.lengths[steps].sum(axis=1))
        _bring_largest(steps[1:], self.lengths[steps[1:]].max(axis=1, initial=0))
        rest = order[full:]
        again = numpy.resize(rest, self._missing) + len(self.lengths) if self._missing else rest[:0]
        yield from numpy.concatenate([steps.flatten(), rest, again]).tolist()


def _bring_largest(steps: numpy.ndarray, sizes: numpy.ndarray) -> None:
    """Exchange the first step with the one of the largest size."""
    if len(steps):
        largest = int(sizes.argmax())
        steps[[0, largest]] = steps[[largest, 0]]


def lengths_of(rows: Dataset | PackedRows) -> numpy.ndarray:
    """Tokens of each row."""
    if isinstance(rows, PackedRows):
        sizes = column(rows.samples, "length")
        return numpy.add.reduceat(sizes[rows.members], numpy.concatenate([[0], rows.ends[:-1]]))
    return column(rows, "length")


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions of rows in batches of similar length, longest first: as many as fit in `tokens` padded ones, at least one."""
    ordered = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    while ordered:
        size = max(tokens // lengths[ordered[0]], 1)
        yield ordered[:size]
        ordered = ordered[size:]
