"""Which reader a file gets: by its ending, unless its first bytes say that it is something else."""

from __future__ import annotations

import codecs
import io
import pathlib
import shlex
import zlib
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.parquet

from nybble.data.readers.json_rows import read_json
from nybble.data.readers.row import Item, Notice, Row
from nybble.data.readers.tables import read_csv
from nybble.data.readers.text import document, is_packed, kind_of, opened
from nybble.errors import DataError
from nybble.lfs import pointer_fault

GZIP = b"\x1f\x8b"
ARCHIVES = {  # first bytes: what such a file is, and what to do
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    GZIP: ("compressed with gzip", "add .gz to its name"),
    b"PAR1": ("a parquet file", "rename it to .parquet"),
    b"%PDF-": ("a PDF", "write its text to a file"),
}
PAGES = (b"<!doctype html", b"<html")


def read_file(file: pathlib.Path) -> Iterator[Item]:
    """Rows and faults of one file, in order.

    Raises:
        DataError: the file is empty, of another kind or encoding, or its rest cannot be read.
    """
    some = False
    if file.stat().st_size == 0:
        raise DataError("the file is empty", where=str(file), fix="remove it from the data, or fill it")
    refuse_stranger(file)
    _refuse_page(file)
    for item in KINDS[kind_of(file)](file):
        some = some or not isinstance(item, Notice)
        yield item
    if not some:
        raise DataError("there are no rows in the file", where=str(file), fix="remove it from the data, or fill it")


def refuse_stranger(file: pathlib.Path) -> None:
    """Refuse a file that stands for another one, or is not what its name says.

    Raises:
        DataError: what it is instead.
    """
    if (fault := pointer_fault(file)) is not None:
        raise DataError(fault[0], where=str(file), fix=fault[1])
    start = _first_bytes(file)
    expected = {b"PAR1": kind_of(file) == ".parquet", GZIP: is_packed(file)}
    for mark, (what, fix) in ARCHIVES.items():
        if start.startswith(mark) and not expected.get(mark):
            raise DataError(f"the file is {what}, not what its name says", where=str(file), fix=fix)
    if start and is_packed(file) and not start.startswith(GZIP):
        raise DataError(
            "the file is not compressed with gzip, although its name says so",
            where=str(file),
            fix="remove .gz from its name, or compress it",
        )


def _refuse_page(file: pathlib.Path) -> None:
    if kind_of(file) != ".txt" and _first_bytes(file).removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(PAGES):
        raise DataError(
            "the file is a web page, not data",
            where=str(file),
            fix="download the file itself; on the Hub its address has /resolve/ where the page's has /blob/",
        )


def _first_bytes(file: pathlib.Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(64)


def _read_parquet(file: pathlib.Path) -> Iterator[Item]:
    try:
        with opened(file) as stream:
            readable = io.BytesIO(stream.read()) if is_packed(file) else stream
            number = 0
            for batch in pyarrow.parquet.ParquetFile(readable).iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file}:row {number}")
    except (pyarrow.ArrowInvalid, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"not a parquet file: {error}", where=str(file), fix=f"copy or download {shlex.quote(file.name)} again"
        ) from error


def _read_text(file: pathlib.Path) -> Iterator[Item]:
    """A document, whole."""
    text = document(file)
    if text.strip():
        yield Row({"text": text}, f"{file}:1")


JSON_KINDS = (".jsonl", ".ndjson", ".json")
KINDS: dict[str, Callable[[pathlib.Path], Iterator[Item]]] = {
    **dict.fromkeys(JSON_KINDS, read_json),
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
