"""The order in which rows are trained on, and the batches in which they are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from datasets import Dataset

from nybble.data.batches import PackedRows
from nybble.data.sets.prepare import column

MEGA = 50  # steps whose rows are sorted together: enough to pad little, few enough to stay random


class GroupedByLength(torch.utils.data.Sampler[int]):
    """A random order in which rows of similar length share a step, the longest step comes first, and its longest rows in it.

    Padding to the longest wastes little then, and what does not fit into memory fails at once and not late. The order
    depends on seed, epoch and the rows of a step alone: an interrupted run continues where it was, and a step holds the same
    rows however it is split into micro batches and processes.

    Args:
        lengths: tokens of each row.
        step: rows of one optimiser step.
    """

    def __init__(self, lengths: numpy.ndarray, step: int, seed: int) -> None:
        self.lengths = lengths
        self.step = step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate says so before an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = numpy.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        mega = MEGA * self.step
        together = [order[start:][:mega] for start in range(0, len(order), mega)]
        order = numpy.concatenate([part[numpy.argsort(-self.lengths[part], kind="stable")] for part in together])
        whole = len(order) // self.step * self.step
        steps = generator.permutation(order[:whole].reshape(-1, self.step))
        if len(steps):
            longest = int(self.lengths[steps].max(axis=1).argmax())
            steps[[0, longest]] = steps[[longest, 0]]
        yield from numpy.concatenate([steps.flatten(), order[whole:]]).tolist()


def lengths_of(rows: Dataset | PackedRows) -> numpy.ndarray:
    """Tokens of each row."""
    if isinstance(rows, PackedRows):
        sizes = column(rows.samples, "length")
        return numpy.add.reduceat(sizes[rows.members], numpy.concatenate([[0], rows.ends[:-1]]))
    return column(rows, "length")


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions of rows of similar length together, the longest first: as many as fit into `tokens` padded ones, at least one."""
    ordered = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    while ordered:
        size = max(tokens // lengths[ordered[0]], 1)
        yield ordered[:size]
        ordered = ordered[size:]
