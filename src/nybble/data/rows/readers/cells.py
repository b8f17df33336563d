"""Converts Arrow's cells to Python values, a few rows at a time, after estimating how large these will be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow
import pyarrow.compute

from nybble.data.rows.readers.row import MB, Unreadable

DECODED_BYTES = 64 * MB  # of rows that exist as Python values at a time
VALUE_BYTES = 32  # approximate size of any value as a Python object
UNREADABLE = (ValueError, ArithmeticError, LookupError, ImportError, pyarrow.ArrowException)
"""Errors of cells for which Python has no value: text that is not UTF-8, the year 300,000, an unknown time zone."""


def rows_of(batch: pyarrow.RecordBatch, limit: int) -> Iterator[dict[str, Any] | int]:
    """The values of each row; for a row over the limit, its size in bytes instead."""
    sizes = sum((_sizes(column) for column in batch.columns), numpy.zeros(len(batch), numpy.int64))
    ends = numpy.cumsum(sizes)
    start = 0
    while start < len(batch):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(numpy.searchsorted(ends, before + DECODED_BYTES, "right")))
        if end > start + 1 and sizes[start:end].max() > limit:
            end = start + max(1, int(numpy.argmax(sizes[start:end] > limit)))
        if sizes[start] > limit:
            yield int(sizes[start])
        else:
            yield from _values(batch.slice(start, end - start))
        start = end


def _values(rows: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    # Plain text is ten times as fast: Arrow makes a scalar for each reference to a dictionary.
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
    """The approximate bytes that each value would take."""
    kind = array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _sizes(array.storage)
    if pyarrow.types.is_dictionary(kind):
        entries = _sizes(array.dictionary)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return entries[indices] if len(entries) else numpy.zeros(len(array), numpy.int64)
    if pyarrow.types.is_struct(kind):
        return sum((_sizes(child) for child in array.flatten()), numpy.full(len(array), VALUE_BYTES, numpy.int64))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind):
        parts = (array.keys, array.items) if pyarrow.types.is_map(kind) else (array.values,)
        elements = sum(_sizes(part) for part in parts)
        totals = numpy.concatenate([[0], numpy.cumsum(elements, dtype=numpy.int64)])
        bounds: numpy.ndarray = totals[array.offsets.to_numpy()]
        return numpy.diff(bounds) + VALUE_BYTES
    if pyarrow.types.is_fixed_size_list(kind):
        return numpy.full(len(array), VALUE_BYTES * (1 + kind.list_size), numpy.int64)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_large_binary(kind)):  # fmt: skip
        return numpy.full(len(array), VALUE_BYTES, numpy.int64)
    lengths: numpy.ndarray = pyarrow.compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(numpy.int64) + VALUE_BYTES
