"""Arrow's cells as Python's values, a few rows at a time, and how large they would be before they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from nybble.data.rows.readers.row import MB, Unreadable

HELD = 64 * MB  # bytes of rows that are held as Python's values at a time
VALUE = 32  # bytes that any value takes as an object of Python's, about
UNREADABLE = (ValueError, ArithmeticError, LookupError, ImportError, pyarrow.ArrowException)
"""What a cell raises that Python has no value for: text that is not UTF-8, the year 300,000, an unknown time zone."""


def rows_of(batch: pyarrow.RecordBatch, limit: int) -> Iterator[dict[str, Any] | int]:
    """The values of each row; of a row over the limit its size in bytes instead."""
    each = sum((_sizes(column) for column in batch.columns), numpy.zeros(len(batch), numpy.int64))
    ends = numpy.cumsum(each)
    start = 0
    while start < len(batch):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(numpy.searchsorted(ends, before + HELD, "right")))
        if end > start + 1 and each[start:end].max() > limit:
            end = start + max(1, int(numpy.argmax(each[start:end] > limit)))
        if each[start] > limit:
            yield int(each[start])
        else:
            yield from _values(batch.slice(start, end - start))
        start = end


def _values(rows: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    # Arrow makes a scalar of each reference to a dictionary, and of plain text it does not: ten times as fast.
    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column for column in rows.columns
    ]
    names = rows.schema.names
    try:
        values: list[dict[str, Any]] = pyarrow.RecordBatch.from_arrays(columns, names=names).to_pylist()
    except UNREADABLE:
        cells = [[_value(cell) for cell in column] for column in columns]
        return [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]
    return values


def _value(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except UNREADABLE as error:
        return Unreadable(f"{type(error).__name__}: {error}"[:200])


def _sizes(array: pyarrow.Array) -> numpy.ndarray:
    """How many bytes each value would take, about."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _sizes(array.storage)
    if pyarrow.types.is_dictionary(kind):
        own = _sizes(array.dictionary)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return own[indices] if len(own) else numpy.zeros(len(array), numpy.int64)
    if pyarrow.types.is_struct(kind):
        return sum((_sizes(child) for child in array.flatten()), numpy.full(len(array), VALUE, numpy.int64))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind):
        parts = (array.keys, array.items) if pyarrow.types.is_map(kind) else (array.values,)
        inside = sum(_sizes(part) for part in parts)
        totals = numpy.concatenate([[0], numpy.cumsum(inside, dtype=numpy.int64)])
        bounds: numpy.ndarray = totals[array.offsets.to_numpy()]
        return numpy.diff(bounds) + VALUE
    if pyarrow.types.is_fixed_size_list(kind):
        return numpy.full(len(array), VALUE * (1 + kind.list_size), numpy.int64)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_large_binary(kind)):  # fmt: skip
        return numpy.full(len(array), VALUE, numpy.int64)
    lengths: numpy.ndarray = pyarrow.compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(numpy.int64) + VALUE
