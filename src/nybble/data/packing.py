"""Packing: several samples in one row of fixed length."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy

CHUNK = (
    65_536  # samples taken from the arrays at once: as Python's numbers, all of a large set would take 70 bytes each
)


def best_fit(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> list[numpy.ndarray]:
    """Best-fit decreasing (Johnson 1974): each sample goes where it leaves the least room.

    Args:
        lengths: tokens of each sample, at most `capacity`.
        capacity: tokens of a packed row.

    Returns:
        For each packed row, the positions in `lengths` it holds. Every position stands in exactly one row.
    """
    sizes = numpy.asarray(lengths, dtype=numpy.int64)
    assert (sizes <= capacity).all(), "a sample longer than a packed row"
    order = numpy.argsort(-sizes, kind="stable")
    owners = numpy.empty(len(sizes), dtype=numpy.int64)
    open_rows: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys of open_rows, sorted: at most `capacity` of them, however many rows there are
    count = 0
    for place, length in _in_turn(sizes[order]):
        found = bisect.bisect_left(rooms, length)
        if found == len(rooms):
            row, room, count = count, capacity, count + 1
        else:
            room = rooms[found]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[found]
        owners[place] = row
        _open(open_rows, rooms, row, room - length)
    members = order[numpy.argsort(owners, kind="stable")]
    return numpy.split(members, numpy.cumsum(numpy.bincount(owners, minlength=count))[:-1]) if count else []


def _in_turn(sizes: numpy.ndarray) -> Iterator[tuple[int, int]]:
    for first in range(0, len(sizes), CHUNK):
        yield from enumerate(sizes[first : first + CHUNK].tolist(), first)


def _open(open_rows: dict[int, list[int]], rooms: list[int], row: int, room: int) -> None:
    if room == 0:
        return
    if room not in open_rows:
        open_rows[room] = []
        bisect.insort(rooms, room)
    open_rows[room].append(row)
