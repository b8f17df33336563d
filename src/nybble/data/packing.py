"""Packing: several samples in one row of fixed length."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy

from nybble.data.rows.formats import Target

CHUNK = 65_536  # samples converted to Python's numbers at once: they take 70 bytes each


def packed_length(max_length: int, target: Target) -> int:
    """Tokens of a packed row: room for at least one sample, and a pair is two sequences."""
    return 2 * max_length if target == "pairs" else max_length


def best_fit(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> list[numpy.ndarray]:
    """Best-fit decreasing (Johnson 1974): each sample goes into the row in which it leaves the least space.

    Args:
        lengths: tokens of each sample, at most `capacity`.
        capacity: tokens of a packed row.

    Returns:
        For each packed row, the positions in `lengths` of its samples. Every position is in exactly one row.
    """
    sizes = numpy.asarray(lengths, dtype=numpy.int64)
    assert (sizes <= capacity).all(), "a sample longer than a packed row"
    order = numpy.argsort(-sizes, kind="stable")
    row_of_sample = numpy.empty(len(sizes), dtype=numpy.int64)
    open_rows: dict[int, list[int]] = {}  # space left -> rows that have it
    spaces: list[int] = []  # the keys of open_rows, sorted: at most `capacity` of them, however many rows there are
    count = 0
    for position, length in _enumerated(sizes[order]):
        index = bisect.bisect_left(spaces, length)
        if index == len(spaces):
            row, space, count = count, capacity, count + 1
        else:
            space = spaces[index]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[index]
        row_of_sample[position] = row
        _open(open_rows, spaces, row, space - length)
    members = order[numpy.argsort(row_of_sample, kind="stable")]
    return numpy.split(members, numpy.cumsum(numpy.bincount(row_of_sample, minlength=count))[:-1]) if count else []


def _enumerated(sizes: numpy.ndarray) -> Iterator[tuple[int, int]]:
    for first in range(0, len(sizes), CHUNK):
        yield from enumerate(sizes[first : first + CHUNK].tolist(), first)


def _open(open_rows: dict[int, list[int]], spaces: list[int], row: int, space: int) -> None:
    if space == 0:
        return
    if space not in open_rows:
        open_rows[space] = []
        bisect.insort(spaces, space)
    open_rows[space].append(row)
