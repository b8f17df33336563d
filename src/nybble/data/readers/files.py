"""Which reader a file gets: by its ending."""

from __future__ import annotations

import io
import pathlib
import zlib
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet

from nybble.data.readers.json_rows import read_json, read_jsonl
from nybble.data.readers.row import Item, Row
from nybble.data.readers.tables import read_csv
from nybble.data.readers.text import kind_of, lines, opened
from nybble.errors import DataError


def read_file(file: pathlib.Path) -> Iterator[Item]:
    """Rows and faults of one file, in order.

    Raises:
        DataError: the file is empty or of another encoding, or its rest cannot be read.
    """
    some = False
    if file.stat().st_size == 0:
        raise DataError("the file is empty", where=str(file), fix="take it out of the data, or fill it")
    for item in KINDS[kind_of(file)](file):
        some = True
        yield item
    if not some:
        raise DataError("there are no rows in the file", where=str(file), fix="take it out of the data, or fill it")


def _read_parquet(file: pathlib.Path) -> Iterator[Item]:
    try:
        with opened(file) as stream:
            readable = stream if file.suffix != ".gz" else io.BytesIO(stream.read())
            number = 0
            for batch in pyarrow.parquet.ParquetFile(readable).iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file}:row {number}")
    except (pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise DataError(f"not a parquet file: {error}", where=str(file)) from error


def _read_text(file: pathlib.Path) -> Iterator[Item]:
    """A document, whole."""
    text = "".join(lines(file))
    if text.strip():
        yield Row({"text": text.replace("\r\n", "\n")}, f"{file}:1")


KINDS: dict[str, Callable[[pathlib.Path], Iterator[Item]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
