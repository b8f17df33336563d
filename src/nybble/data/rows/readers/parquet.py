"""Reads parquet, a few rows at a time; the sizes of pages, dictionaries and rows are checked before they are uncompressed."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow
import pyarrow.parquet

from nybble.data.rows.readers.cells import DECODED_BYTES, rows_of
from nybble.data.rows.readers.open_file import CHUNK, OpenFile
from nybble.data.rows.readers.pages import Page, longest_text, pages
from nybble.data.rows.readers.row import MB, Item, Row, too_large
from nybble.errors import DataError

BATCH_ROWS = 1024  # rows that are decoded at a time, fewer if they are large
PAGE_FACTOR = 16  # a page, which rows share, may be this many times the limit of a row
MAX_VALUES = 1 << 26  # values in the lists of a column of a row group: a few bytes can stand for billions
UNPACKED_BYTES, UNPACKED_FACTOR = 256 * MB, 100  # a .gz may unpack to this many bytes, or to this many times its size
LARGE_DICTIONARY = 2 * MB  # the longest text of a larger dictionary is not determined; 1 MB is usual
NUMBERS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes
TEXTS = ("NONE", "STRING", "JSON", "ENUM", "BSON")
PREFIX_ENCODING = "DELTA_BYTE_ARRAY"  # each value may repeat all of the one before


def read_parquet(file: OpenFile, limit: int) -> Iterator[Item]:
    """Rows and faults of a parquet file.

    Args:
        file: the file, perhaps gzipped.
        limit: bytes that a row may have.

    Raises:
        DataError: it is not a parquet file, or the rest of it cannot be read within the limits.
    """
    number = 0
    try:
        with _seekable(file) as stream:
            metadata = pyarrow.parquet.read_metadata(stream)
            readers = {by_reference: _reader(stream, metadata, by_reference) for by_reference in (False, True)}
            names = readers[False].schema_arrow.names
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(
                    f"two columns have the same name: {repeated[0]!r:.60}",
                    where=str(file),
                    fix="give each column a different name",
                )
            for group in range(metadata.num_row_groups):
                if not metadata.num_columns:  # there is nothing to read, and Arrow 22 would crash the process
                    continue
                _check_column_metadata(readers[False], group)
                plan = _plan(metadata.row_group(group), stream, limit, f"{file}:row {number + 1}")
                batches = readers[plan.by_reference].iter_batches(plan.rows, row_groups=[group], use_threads=False)
                for batch in batches:
                    for values in rows_of(batch, limit):
                        number += 1
                        origin = f"{file}:row {number}"
                        yield (
                            too_large("a row", limit, origin, values)
                            if isinstance(values, int)
                            else Row(values, origin)
                        )
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{'damaged' if number else 'not a parquet file'}: {str(error).strip()}"[:300],
            where=f"{file}:row {number + 1}" if number else str(file),
            fix=f"copy or download {shlex.quote(file.path.name)} again",
        ) from error


@dataclass
class _Plan:
    """How a row group is read."""

    rows: int = BATCH_ROWS
    """The number of rows that are decoded at a time."""
    by_reference: bool = False
    """Whether texts stay references to their dictionary: ten times slower, but a text shared by a million rows is stored once."""


def _reader(
    stream: IO[bytes], metadata: pyarrow.parquet.FileMetaData, by_reference: bool
) -> pyarrow.parquet.ParquetFile:
    columns = [metadata.schema.column(number) for number in range(len(metadata.schema))]
    texts = [
        column.path
        for column in columns
        if by_reference and column.physical_type == "BYTE_ARRAY" and column.logical_type.type in TEXTS
    ]
    return pyarrow.parquet.ParquetFile(
        stream, metadata=metadata, read_dictionary=texts, pre_buffer=False, buffer_size=CHUNK
    )


def _check_column_metadata(reader: pyarrow.parquet.ParquetFile, group: int) -> None:
    """Have Arrow read a group's column metadata, but none of its pages.

    If the metadata is damaged, this raises an exception; asking for a column's metadata directly would crash the process.

    Raises:
        OSError: the metadata is damaged.
    """
    next(reader.reader.iter_batches(0, [group], use_threads=False), None)


def _plan(group: pyarrow.parquet.RowGroupMetaData, stream: IO[bytes], limit: int, where: str) -> _Plan:
    """How a group can be read within the limits.

    Raises:
        DataError: it cannot.
    """
    sizes = [
        _column_size(group.column(index), max(group.num_rows, 1), stream, limit, where)
        for index in range(group.num_columns)
    ]
    by_reference = any(size.has_large_dictionary for size in sizes)
    largest = max((size.row if by_reference else max(size.row, size.dictionary_text) for size in sizes), default=1.0)
    return _Plan(max(1, min(BATCH_ROWS, int(DECODED_BYTES / max(largest, 1)))), by_reference)


@dataclass
class _ColumnSize:
    """The memory that a column takes."""

    row: float = 0.0
    """Bytes per row, an upper bound if the rows of a page are alike."""
    dictionary_text: int = 0
    """Bytes of the longest text in its dictionary, which any row may contain."""
    has_large_dictionary: bool = False


def _column_size(
    column: pyarrow.parquet.ColumnChunkMetaData, rows: int, stream: IO[bytes], limit: int, where: str
) -> _ColumnSize:
    name, values = column.path_in_schema, column.num_values
    if values > max(MAX_VALUES, rows):
        raise DataError(
            f"the column {name!r:.60} has lists of {values:,} values for {rows:,} rows",
            where=where,
            fix=f"write the file with smaller row groups, of fewer than {MAX_VALUES:,} values",
        )
    size, longest, references = _ColumnSize(), 0, 0
    if not values:  # its offsets may be invalid
        return size
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    for page in pages(stream, start, column.total_compressed_size):
        if page.size > PAGE_FACTOR * limit:
            raise _too_large_page(name, page.size, limit, where)
        if page.is_dictionary:
            longest = _longest(stream, page, column)
            continue
        references += page.values if page.uses_dictionary else 0
        sharing = 1 if PREFIX_ENCODING in column.encodings else max(page.values, 1)
        size.row = max(size.row, page.size / sharing * max(values / rows, 1))
    if references and column.physical_type == "BYTE_ARRAY":
        size.dictionary_text = longest
        size.has_large_dictionary = longest > LARGE_DICTIONARY or (
            values > rows and longest * references > UNPACKED_BYTES
        )
    elif references:
        size.row = max(size.row, longest)
    return size


def _longest(stream: IO[bytes], page: Page, column: pyarrow.parquet.ColumnChunkMetaData) -> int:
    """An upper bound for the bytes of the longest value in a column's dictionary."""
    if page.size > LARGE_DICTIONARY or column.physical_type != "BYTE_ARRAY":
        return min(page.size, NUMBERS.get(column.physical_type, page.size))
    return longest_text(stream, page, column.compression)


def _too_large_page(column: str, size: int, limit: int, where: str) -> DataError:
    return DataError(
        f"the column {column!r:.60} has a page of {size / MB:,.0f} MB; {PAGE_FACTOR * limit / MB:,.0f} MB is the limit",
        where=where,
        fix="write the file with smaller rows or pages; if rows are meant to be this large, allow it with "
        f"data.max_row_mb={-(-size // MB)}",
    )


@contextlib.contextmanager
def _seekable(file: OpenFile) -> Iterator[IO[bytes]]:
    """A file's bytes; a gzipped file is unpacked into a temporary one, since the end of a parquet file is read first."""
    if not file.is_gzipped:
        with file.stored() as stream:
            yield stream
        return
    max_size = max(UNPACKED_BYTES, UNPACKED_FACTOR * file.status.st_size)
    with file.unpacked() as packed, tempfile.TemporaryFile() as stream:
        while piece := packed.read(CHUNK):
            try:
                stream.write(piece)
                stream.flush()
            except OSError as error:
                raise DataError(
                    f"the file cannot be unpacked in {tempfile.gettempdir()}: {error.strerror}",
                    where=str(file),
                    fix=f"gunzip --keep {shlex.quote(str(file))} on a disk with enough space, and give the parquet file itself",
                ) from error
            if stream.tell() > max_size:
                raise DataError(
                    f"the file unpacks to more than {max_size / MB:,.0f} MB, {UNPACKED_FACTOR} times its size",
                    where=str(file),
                    fix=f"gunzip --keep {shlex.quote(str(file))}, and give the parquet file itself",
                )
        stream.seek(0)
        yield stream
