"""Opens files and chooses their readers: by suffix, unless the first bytes show that a file is something else."""

from __future__ import annotations

import codecs
import contextlib
import pathlib
import shlex
import stat
from collections.abc import Callable, Iterator

from nybble.data.rows.readers.json_rows import read_json
from nybble.data.rows.readers.kinds import kind_of
from nybble.data.rows.readers.lines import beginning, read_document
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.parquet import read_parquet
from nybble.data.rows.readers.row import MAX_ROW, Item, Notice, Row, TooLargeError
from nybble.data.rows.readers.tables import read_csv
from nybble.errors import DataError
from nybble.files.lfs import LONGEST, pointer_in
from nybble.files.reading import KINDS as SPECIAL_KINDS

HEAD_BYTES = 64  # first bytes that show what kind of file it is
GZIP = b"\x1f\x8b"
SIGNATURES = {  # first bytes: what the file is, and what to do
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
    "a .txt file is one document: {} data.overlength=split trains on all of it; if it contains several documents, "
    'write each as a line of a .jsonl file: {"text": "..."}'
)
HTML_STARTS = (b"<!doctype html", b"<html")


@contextlib.contextmanager
def open_data_file(path: pathlib.Path) -> Iterator[OpenFile]:
    """Open a file from which rows or text are read.

    Raises:
        DataError: it is a special file, a pointer to another file, not what its name says, or cannot be opened.
    """
    refuse_special(path)
    try:
        file = OpenFile(path)
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        _refuse_other_kinds(file)
        yield file


def read_file(path: pathlib.Path, limit: int = MAX_ROW) -> Iterator[Item]:
    """Open one file and read it with `read_rows_of`."""
    with open_data_file(path) as file:
        yield from read_rows_of(file, limit)


def read_rows_of(file: OpenFile, limit: int = MAX_ROW) -> Iterator[Item]:
    """Rows and faults of one file, in order.

    Args:
        file: from `open_data_file`.
        limit: the maximum size of a row: characters of text, bytes of parquet.

    Raises:
        DataError: the file is empty or of another kind or encoding, or the rest of it cannot be read.
    """
    has_rows = False
    try:
        if not file.first(1):
            raise DataError("the file is empty", where=str(file), fix="remove it from the data, or fill it")
        _refuse_page(file)
        for item in KINDS[kind_of(file.path)](file, limit):
            has_rows = has_rows or not isinstance(item, Notice)
            yield item
    except OSError as error:
        raise unreadable(file.path, error) from error
    if not has_rows:
        raise DataError("there are no rows in the file", where=str(file), fix="remove it from the data, or fill it")


def refuse_special(file: pathlib.Path) -> None:
    """Refuse what is not a regular file, before it is opened: a pipe would wait for a writer, a device may have no end.

    Raises:
        DataError: it is something else, does not exist, or cannot be accessed.
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
        raise unreadable(file, error) from error
    if (kind := SPECIAL_KINDS.get(stat.S_IFMT(mode))) is not None and not stat.S_ISDIR(mode):
        raise DataError(
            f"this is {kind}, not a file; data is read more than once",
            where=str(file),
            fix="write its data to a file first",
        )


def unreadable(file: pathlib.Path, error: OSError) -> DataError:
    """The fault of a file that the operating system cannot read."""
    reason = (error.strerror or str(error)).lower()
    return DataError(f"the file cannot be read: {reason}", where=str(file), fix=f"ls -l {shlex.quote(str(file))}")


def read_text_file(path: pathlib.Path, limit: int = MAX_ROW) -> str:
    """A whole text file, with line feeds at the ends of its lines.

    Raises:
        DataError: as for `open_data_file`, or the file is not UTF-8, or longer than `limit` characters.
    """
    with open_data_file(path) as file:
        return read_document(file, limit)


def _refuse_other_kinds(file: OpenFile) -> None:
    """Refuse a pointer to another file, and a file that is not what its name says.

    Raises:
        DataError: it is one of these; the message says what it is.
    """
    try:
        head = file.first(LONGEST)
        pointer, start = pointer_in(head, file.path), head[:HEAD_BYTES]
        inside = beginning(file, HEAD_BYTES) if file.is_gzipped and start.startswith(GZIP) else b""
    except OSError as error:
        raise unreadable(file.path, error) from error
    if pointer is not None:
        raise DataError(pointer[0], where=str(file), fix=pointer[1])
    is_table = kind_of(file.path) == ".parquet"
    for mark, (what, fix) in SIGNATURES.items():
        if start.startswith(mark) and not (mark == b"PAR1" and is_table) and not (mark == GZIP and file.is_gzipped):
            raise DataError(f"the file is {what}, not what its name says", where=str(file), fix=fix)
        if inside.startswith(mark) and not (mark == b"PAR1" and is_table):
            what = "compressed with gzip twice" if mark == GZIP else f"{what}, compressed with gzip"
            raise DataError(
                f"the file is {what}, not what its name says", where=str(file), fix="unpack it and see what it contains"
            )
    if start and file.is_gzipped and not start.startswith(GZIP):
        raise DataError(
            "the file is not compressed with gzip, although its name says so",
            where=str(file),
            fix="remove .gz from its name, or compress it",
        )


def _refuse_page(file: OpenFile) -> None:
    start = file.first(HEAD_BYTES)
    if kind_of(file.path) != ".txt" and start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(HTML_STARTS):
        raise DataError(
            "the file is a web page, not data",
            where=str(file),
            fix="download the file itself; on the Hub its address has /resolve/ where the page's has /blob/",
        )


def _read_text(file: OpenFile, limit: int) -> Iterator[Item]:
    """A whole file as one document."""
    try:
        text = read_document(file, limit)
    except TooLargeError as fault:
        raise TooLargeError(fault.what, fault.where, fault.option, LARGE_TEXT) from None
    if text.strip():
        yield Row({"text": text}, f"{file}:1")


JSON_KINDS = (".jsonl", ".ndjson", ".json")
KINDS: dict[str, Callable[[OpenFile, int], Iterator[Item]]] = {
    **dict.fromkeys(JSON_KINDS, read_json),
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": _read_text,
}
