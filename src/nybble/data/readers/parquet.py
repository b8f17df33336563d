"""Parquet, a few rows at a time: what pages, dictionaries and rows unpack to is looked at before they are unpacked."""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO

import pyarrow
import pyarrow.parquet

from nybble.data.readers.cells import HELD, rows_of
from nybble.data.readers.pages import pages
from nybble.data.readers.row import MB, Item, Row, too_large
from nybble.data.readers.text import CHUNK, is_packed, opened
from nybble.errors import DataError

ROWS = 1024  # that are unpacked at a time, or fewer where they are large
PAGE = 16  # times as large as a row a page may be: rows share it
ELEMENTS = 1 << 26  # of the lists in a column of a row group: a few bytes can stand for billions
UNPACKED, GROWTH = 256 * MB, 100  # what a .gz may unpack to: so many bytes, or so many times its size
TEXTS = ("NONE", "STRING", "JSON", "ENUM", "BSON")
PREFIXED = "DELTA_BYTE_ARRAY"  # each value may take over all of the one before


def read_parquet(file: pathlib.Path, limit: int) -> Iterator[Item]:
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
            reader = _reader(stream)
            names = reader.schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(
                    f"two columns have the same name: {twice[0]!r:.60}",
                    where=str(file),
                    fix="give each column a different name",
                )
            for group in range(reader.num_row_groups):
                rows = _rows_at_once(reader.metadata.row_group(group), stream, limit, f"{file}:row {number + 1}")
                for batch in reader.iter_batches(rows, row_groups=[group], use_threads=False):
                    for values in rows_of(batch, limit):
                        number += 1
                        origin = f"{file}:row {number}"
                        if isinstance(values, int):
                            yield too_large("a row", limit, origin, values)
                        else:
                            yield Row(dict(zip(names, values, strict=True)), origin)
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{'damaged' if number else 'not a parquet file'}: {error}"[:300],
            where=f"{file}:row {number + 1}" if number else str(file),
            fix=f"copy or download {shlex.quote(file.name)} again",
        ) from error


def _reader(stream: IO[bytes]) -> pyarrow.parquet.ParquetFile:
    """The file with its texts as references to dictionaries: one long text that a million rows share is held once."""
    metadata = pyarrow.parquet.read_metadata(stream)
    columns = [metadata.schema.column(place) for place in range(len(metadata.schema))]
    texts = [
        column.path
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in TEXTS
    ]
    return pyarrow.parquet.ParquetFile(
        stream, metadata=metadata, read_dictionary=texts, pre_buffer=False, buffer_size=CHUNK
    )


def _rows_at_once(
    group: pyarrow.parquet.RowGroupMetaData, stream: IO[bytes], limit: int, where: str
) -> int:
    """How many rows of a group can be unpacked at a time.

    Raises:
        DataError: not even one.
    """
    heavy = 1.0  # bytes of a row, about
    for place in range(group.num_columns):
        column = group.column(place)
        name, rows = column.path_in_schema, max(group.num_rows, 1)
        if column.num_values > max(ELEMENTS, rows):
            raise DataError(
                f"the column {name!r:.60} has lists of {column.num_values:,} values for {rows:,} rows",
                where=where,
                fix=f"write the file with smaller row groups, of fewer than {ELEMENTS:,} values",
            )
        starts = [column.data_page_offset]
        if column.has_dictionary_page and 0 < column.dictionary_page_offset < starts[0]:
            starts = [column.dictionary_page_offset]
        for page in pages(stream, starts[0], column.total_compressed_size):
            if page.size > PAGE * limit:
                raise DataError(
                    f"the column {name!r:.60} has a page of {page.size / MB:,.0f} MB; {PAGE * limit / MB:,.0f} MB is the limit",
                    where=where,
                    fix="write the file with smaller rows or pages; if rows are meant to be this large, allow it with "
                    f"data.max_row_mb={-(-page.size // MB)}",
                )
            shared = 1 if PREFIXED in column.encodings else max(page.values, 1)
            heavy = max(heavy, page.size / shared * max(column.num_values / rows, 1))
    return max(1, min(ROWS, int(HELD / heavy)))


@contextlib.contextmanager
def _seekable(file: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file's bytes, those of a packed one in a temporary file: its end must be read first."""
    if not is_packed(file):
        with file.open("rb") as stream:
            yield stream
        return
    most = max(UNPACKED, GROWTH * file.stat().st_size)
    with opened(file) as packed, tempfile.TemporaryFile() as stream:
        while piece := packed.read(CHUNK):
            stream.write(piece)
            if stream.tell() > most:
                raise DataError(
                    f"the file unpacks to more than {most / MB:,.0f} MB, {GROWTH} times its size",
                    where=str(file),
                    fix=f"gunzip --keep {shlex.quote(str(file))}, and give the parquet file itself",
                )
        stream.seek(0)
        yield stream
