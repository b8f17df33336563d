"""Packing: several samples in one row of fixed length."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy


def best_fit(lengths: Sequence[int] | numpy.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson 1974): each sample goes where it leaves the least room.

    Args:
        lengths: tokens of each sample, at most `capacity`.
        capacity: tokens of a packed row.

    Returns:
        For each packed row, the positions in `lengths` it holds. Every position stands in exactly one row.
    """
    sizes = numpy.asarray(lengths, dtype=numpy.int64)
    assert (sizes <= capacity).all(), "a sample longer than a packed row"
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys of open_rows, sorted: at most `capacity` of them, however many rows there are
    for position, length in zip(*_longest_first(sizes), strict=True):
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(position)
        _open(open_rows, rooms, row, room - length)
    return rows


def _longest_first(sizes: numpy.ndarray) -> tuple[list[int], list[int]]:
    order = numpy.argsort(-sizes, kind="stable")
    return order.tolist(), sizes[order].tolist()


def _open(open_rows: dict[int, list[int]], rooms: list[int], row: int, room: int) -> None:
    if room == 0:
        return
    if room not in open_rows:
        open_rows[room] = []
        bisect.insort(rooms, room)
    open_rows[room].append(row)
