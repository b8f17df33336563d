"""Which reader a file gets: by its ending, unless its first bytes say that it is something else."""

from __future__ import annotations

import codecs
import pathlib
import shlex
import stat
from collections.abc import Callable, Iterator

from nybble.data.rows.readers.json_rows import read_json
from nybble.data.rows.readers.lines import beginning, document, is_packed, kind_of
from nybble.data.rows.readers.parquet import read_parquet
from nybble.data.rows.readers.row import MAX_ROW, Item, Notice, Row, TooLargeError
from nybble.data.rows.readers.tables import read_csv
from nybble.errors import DataError
from nybble.files.lfs import pointer_fault
from nybble.files.reading import KINDS as SPECIAL_KINDS

LOOKED_AT = 64  # bytes by which a stranger is told
GZIP = b"\x1f\x8b"
ARCHIVES = {  # first bytes: what such a file is, and what to do
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    GZIP: ("compressed with gzip", "add .gz to its name"),
    b"PAR1": ("a parquet file", "rename it to .parquet"),
    b"%PDF-": ("a PDF", "write its text to a file"),
    b"PARE": ("an encrypted parquet file", "decrypt it first"),
    b"BZh": ("compressed with bzip2", "unpack it: bunzip2"),
    b"\xfd7zXZ\0": ("compressed with xz", "unpack it: unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "unpack it: unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it: 7z x"),
    b"Rar!\x1a\x07": ("a RAR archive", "unpack it"),
    b"ARROW1": (
        "an Arrow or Feather file",
        "write it as parquet: pyarrow.feather.read_table, pyarrow.parquet.write_table",
    ),
    b"SQLite format 3\0": ("an SQLite database", "export the table as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "save the sheet as CSV"),
    b"\x93NUMPY": ("a NumPy array", "write its rows as JSON lines"),
    b"\x80\x04\x95": ("a pickle, which nybble does not load", "write its rows as JSON lines"),
}
LARGE_TEXT = (
    "a .txt file is one document: {} data.overlength=split trains on all of it; if there are several documents in it, "
    'write each as a line of a .jsonl file: {"text": "..."}'
)
PAGES = (b"<!doctype html", b"<html")


def read_file(file: pathlib.Path, limit: int = MAX_ROW) -> Iterator[Item]:
    """Rows and faults of one file, in order.

    Args:
        file: the file.
        limit: how large a row may be: characters of text, bytes of parquet.

    Raises:
        DataError: the file is empty, special, of another kind or encoding, or its rest cannot be read.
    """
    some = False
    refuse_stranger(file)
    try:
        if not _first_bytes(file):
            raise DataError("the file is empty", where=str(file), fix="remove it from the data, or fill it")
        _refuse_page(file)
        for item in KINDS[kind_of(file)](file, limit):
            some = some or not isinstance(item, Notice)
            yield item
    except OSError as error:
        raise _unreadable(file, error) from error
    if not some:
        raise DataError("there are no rows in the file", where=str(file), fix="remove it from the data, or fill it")


def refuse_special(file: pathlib.Path) -> None:
    """Refuse what is not a file, before it is opened: a pipe would wait for a writer, a device may have no end.

    Raises:
        DataError: what it is, or that there is none, or that it cannot be reached.
    """
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        if not file.is_symlink():
            raise DataError(f"there is no file {file}", fix=f"ls {shlex.quote(str(file.parent))}") from error
        raise DataError(
            f"the file is a link to {file.readlink()}, which does not exist",
            where=str(file),
            fix="remove the link, or get the file that it points to",
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    if (kind := SPECIAL_KINDS.get(stat.S_IFMT(mode))) is not None and not stat.S_ISDIR(mode):
        raise DataError(
            f"this is {kind}, not a file; data is read more than once",
            where=str(file),
            fix="write what it gives to a file first",
        )


def _unreadable(file: pathlib.Path, error: OSError) -> DataError:
    why = (error.strerror or str(error)).lower()
    return DataError(f"the file cannot be read: {why}", where=str(file), fix=f"ls -l {shlex.quote(str(file))}")


def refuse_stranger(file: pathlib.Path) -> None:
    """Refuse a file that stands for another one, or is not what its name says.

    Raises:
        DataError: what it is instead.
    """
    refuse_special(file)
    try:
        pointer, start = pointer_fault(file), _first_bytes(file)
        inside = beginning(file, LOOKED_AT) if is_packed(file) and start.startswith(GZIP) else b""
    except OSError as error:
        raise _unreadable(file, error) from error
    if pointer is not None:
        raise DataError(pointer[0], where=str(file), fix=pointer[1])
    is_table = kind_of(file) == ".parquet"
    for mark, (what, fix) in ARCHIVES.items():
        if start.startswith(mark) and not (mark == b"PAR1" and is_table) and not (mark == GZIP and is_packed(file)):
            raise DataError(f"the file is {what}, not what its name says", where=str(file), fix=fix)
        if inside.startswith(mark) and not (mark == b"PAR1" and is_table):
            what = "compressed with gzip twice" if mark == GZIP else f"{what}, compressed with gzip"
            raise DataError(
                f"the file is {what}, not what its name says", where=str(file), fix="unpack it and see what it contains"
            )
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
        return stream.read(LOOKED_AT)


def _read_text(file: pathlib.Path, limit: int) -> Iterator[Item]:
    """A document, whole."""
    try:
        text = document(file, limit)
    except TooLargeError as fault:
        raise TooLargeError(fault.what, fault.where, fault.option, LARGE_TEXT) from None
    if text.strip():
        yield Row({"text": text}, f"{file}:1")


JSON_KINDS = (".jsonl", ".ndjson", ".json")
KINDS: dict[str, Callable[[pathlib.Path, int], Iterator[Item]]] = {
    **dict.fromkeys(JSON_KINDS, read_json),
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": _read_text,
}
