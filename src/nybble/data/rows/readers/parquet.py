"""Parquet, a few rows at a time: what pages, dictionaries and rows unpack to is looked at before they are unpacked."""

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

from nybble.data.rows.readers.cells import HELD, rows_of
from nybble.data.rows.readers.open_file import CHUNK, OpenFile
from nybble.data.rows.readers.pages import Page, longest_text, pages
from nybble.data.rows.readers.row import MB, Item, Row, too_large
from nybble.errors import DataError

ROWS = 1024  # that are unpacked at a time, or fewer where they are large
PAGE = 16  # times as large as a row a page may be: rows share it
ELEMENTS = 1 << 26  # of the lists in a column of a row group: a few bytes can stand for billions
UNPACKED, GROWTH = 256 * MB, 100  # what a .gz may unpack to: so many bytes, or so many times its size
LARGE_DICTIONARY = 2 * MB  # more than the 1 MB that is usual, so its longest text is not looked for
NUMBERS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes
TEXTS = ("NONE", "STRING", "JSON", "ENUM", "BSON")
PREFIXED = "DELTA_BYTE_ARRAY"  # each value may take over all of the one before


def read_parquet(file: OpenFile, limit: int) -> Iterator[Item]:
    """Rows and faults of a parquet file.

    Args:
        file: the file, perhaps packed with gzip.
        limit: bytes that a row may have.

    Raises:
        DataError: it is not one, or the rest cannot be read within these bounds.
    """
    number = 0
    try:
        with _seekable(file) as stream:
            metadata = pyarrow.parquet.read_metadata(stream)
            readers = {by_reference: _reader(stream, metadata, by_reference) for by_reference in (False, True)}
            names = readers[False].schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(
                    f"two columns have the same name: {twice[0]!r:.60}",
                    where=str(file),
                    fix="give each column a different name",
                )
            for group in range(metadata.num_row_groups):
                if not metadata.num_columns:  # there is nothing to read, and Arrow 22 ends the process over it
                    continue
                _look_at_columns(readers[False], group)
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

    rows: int = ROWS
    """How many are unpacked at a time."""
    by_reference: bool = False
    """Texts stay references to their dictionary, which takes ten times as long, but holds what a million rows share once."""


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


def _look_at_columns(reader: pyarrow.parquet.ParquetFile, group: int) -> None:
    """Have Arrow read what the file's end says of a group's columns, but none of their pages.

    Where that is damaged, this is an exception; asking for a column's metadata would end the process.

    Raises:
        OSError: it is damaged.
    """
    next(reader.reader.iter_batches(0, [group], use_threads=False), None)


def _plan(group: pyarrow.parquet.RowGroupMetaData, stream: IO[bytes], limit: int, where: str) -> _Plan:
    """How a group can be read within these bounds.

    Raises:
        DataError: it cannot.
    """
    columns = [
        _weight(group.column(place), max(group.num_rows, 1), stream, limit, where) for place in range(group.num_columns)
    ]
    by_reference = any(column.has_large_dictionary for column in columns)
    heavy = max((column.own if by_reference else max(column.own, column.referred) for column in columns), default=1.0)
    return _Plan(max(1, min(ROWS, int(HELD / max(heavy, 1)))), by_reference)


@dataclass
class _Weight:
    """What a column takes."""

    own: float = 0.0
    """Bytes of a row, at most where a page's rows are alike."""
    referred: int = 0
    """Bytes of the longest text in its dictionary, which each row may contain."""
    has_large_dictionary: bool = False


def _weight(
    column: pyarrow.parquet.ColumnChunkMetaData, rows: int, stream: IO[bytes], limit: int, where: str
) -> _Weight:
    name, values = column.path_in_schema, column.num_values
    if values > max(ELEMENTS, rows):
        raise DataError(
            f"the column {name!r:.60} has lists of {values:,} values for {rows:,} rows",
            where=where,
            fix=f"write the file with smaller row groups, of fewer than {ELEMENTS:,} values",
        )
    weight, longest, referring = _Weight(), 0, 0
    if not values:  # its offsets may point nowhere
        return weight
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    for page in pages(stream, start, column.total_compressed_size):
        if page.size > PAGE * limit:
            raise _too_large_page(name, page.size, limit, where)
        if page.is_dictionary:
            longest = _longest(stream, page, column)
            continue
        referring += page.values if page.refers else 0
        shared = 1 if PREFIXED in column.encodings else max(page.values, 1)
        weight.own = max(weight.own, page.size / shared * max(values / rows, 1))
    if referring and column.physical_type == "BYTE_ARRAY":
        weight.referred = longest
        weight.has_large_dictionary = longest > LARGE_DICTIONARY or (values > rows and longest * referring > UNPACKED)
    elif referring:
        weight.own = max(weight.own, longest)
    return weight


def _longest(stream: IO[bytes], page: Page, column: pyarrow.parquet.ColumnChunkMetaData) -> int:
    """Bytes of the longest value in a column's dictionary, at most."""
    if page.size > LARGE_DICTIONARY or column.physical_type != "BYTE_ARRAY":
        return min(page.size, NUMBERS.get(column.physical_type, page.size))
    return longest_text(stream, page, column.compression)


def _too_large_page(column: str, size: int, limit: int, where: str) -> DataError:
    return DataError(
        f"the column {column!r:.60} has a page of {size / MB:,.0f} MB; {PAGE * limit / MB:,.0f} MB is the limit",
        where=where,
        fix="write the file with smaller rows or pages; if rows are meant to be this large, allow it with "
        f"data.max_row_mb={-(-size // MB)}",
    )


@contextlib.contextmanager
def _seekable(file: OpenFile) -> Iterator[IO[bytes]]:
    """A file's bytes, those of a packed one in a temporary file: its end must be read first."""
    if not file.is_packed:
        with file.stored() as stream:
            yield stream
        return
    most = max(UNPACKED, GROWTH * file.status.st_size)
    with file.unpacked() as packed, tempfile.TemporaryFile() as stream:
        while piece := packed.read(CHUNK):
            try:
                stream.write(piece)
                stream.flush()
            except OSError as error:
                raise DataError(
                    f"there is no room to unpack the file in {tempfile.gettempdir()}: {error.strerror}",
                    where=str(file),
                    fix=f"gunzip --keep {shlex.quote(str(file))} where there is room, and give the parquet file itself",
                ) from error
            if stream.tell() > most:
                raise DataError(
                    f"the file unpacks to more than {most / MB:,.0f} MB, {GROWTH} times its size",
                    where=str(file),
                    fix=f"gunzip --keep {shlex.quote(str(file))}, and give the parquet file itself",
                )
        stream.seek(0)
        yield stream
