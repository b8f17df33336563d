"""Files to rows, each with its `file:line`.

A reader yields rows, and in place of a line it cannot read the fault; it raises where the rest of the file is lost too.
No reader holds more of a file than a chunk or a row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import pyarrow
import pyarrow.parquet

from nybble.errors import DataError

MAX_CSV_FIELD = 1 << 28  # csv's own default of 128 KiB is less than one long document
CHUNK = 1 << 20  # characters of a JSON array read at a time
BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    origin: str
    """`file:line` (for parquet and the Hub, the number of the row)."""
    source: int = 0
    """Which of the recipe's sources it comes from."""


Item = Row | DataError


def kind_of(file: pathlib.Path) -> str:
    """The suffix that says what a file holds."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


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


def _bytes(file: pathlib.Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _pieces(file: pathlib.Path, read: Callable[[IO[bytes]], bytes]) -> Iterator[bytes]:
    """A file piece by piece, unpacked and without a byte order mark."""
    line = 1
    with _bytes(file) as stream:
        while True:
            try:
                piece = read(stream)
            except EOFError as error:
                raise DataError(
                    "the gzip file is cut short", where=f"{file}:{line}", fix="copy or download it again"
                ) from error
            except (zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"the file cannot be unpacked: {error}", where=f"{file}:{line}") from error
            if not piece:
                return
            if line == 1:
                _refuse_utf16(piece, file)
            line += piece.count(b"\n")
            yield piece


def _raw_lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers."""
    for number, line in enumerate(_pieces(file, lambda stream: stream.readline()), 1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _refuse_utf16(start: bytes, file: pathlib.Path) -> None:
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            "the file is UTF-16, not UTF-8", where=f"{file}:1", fix=f"iconv -f UTF-16 -t UTF-8 {file} > NEW"
        )


def _decoded(line: bytes, origin: str) -> str:
    if b"\0" in line:
        raise DataError("a null byte, as in a damaged or a UTF-16 file", where=origin, fix="save the file as UTF-8")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte {line[error.start]:#04x} at place {error.start + 1} of the line",
            where=origin,
            fix="save the file as UTF-8",
        ) from error


def _lines(file: pathlib.Path) -> Iterator[str]:
    for number, line in _raw_lines(file):
        yield _decoded(line, f"{file}:{number}")


def _read_jsonl(file: pathlib.Path) -> Iterator[Item]:
    for number, line in _raw_lines(file):
        if not line.strip():
            continue
        origin = f"{file}:{number}"
        try:
            yield _row(_parse(_decoded(line, origin), origin), origin)
        except DataError as fault:
            yield fault


def _parse(line: str, origin: str) -> Any:
    try:
        return DECODER.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg} at column {error.colno}",
            where=origin,
            fix="one JSON object a line; mend or delete this line",
        ) from error
    except ConstantError as error:
        raise _no_number(error, origin) from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply to be a row", where=origin) from error


class ConstantError(ValueError):
    """NaN or an infinity, which Python's json writes and JSON does not know."""


def _refuse_constant(name: str) -> NoReturn:
    raise ConstantError(name)


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _no_number(error: ConstantError, origin: str) -> DataError:
    return DataError(f"{error} is not JSON", where=origin, fix="write text, or null for nothing")


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object with named fields, not {type(value).__name__}", where=origin)
    return Row(value, origin)


def _read_json(file: pathlib.Path) -> Iterator[Item]:
    """An array of objects, decoded one by one so that each keeps its line; a file of JSON lines is read as such."""
    start = next((piece.lstrip() for piece in _pieces(file, lambda stream: stream.read(CHUNK)) if piece.strip()), b"")
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _read_array(file)
    elif re.match(rb"\{\s*\n", start):
        raise DataError(
            "one object over several lines, where rows are an array of objects or an object a line",
            where=f"{file}:1",
            fix="if the rows are inside it, write them out as an array: jq .NAME FILE",
        )
    else:
        yield from _read_jsonl(file)


class _Text:
    """A file's text from where the reader stands, as much of it as was asked for."""

    def __init__(self, file: pathlib.Path) -> None:
        self.chunks = _pieces(file, lambda stream: stream.read(CHUNK))
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.file = file
        self.text = ""
        self.place = 0
        self.line = 1
        """Of `place`."""
        self.ended = False

    def more(self) -> None:
        """Read another chunk, or as much as there is already: a long row is not decoded again and again."""
        parts, size, wanted = [self.text[self.place :]], 0, max(1, len(self.text) - self.place)
        while size < wanted and not self.ended:
            chunk = next(self.chunks, b"")
            self.ended = not chunk
            line = self.line + sum(part.count("\n") for part in parts)
            if b"\0" in chunk:
                line += chunk.count(b"\n", 0, chunk.index(b"\0"))
                raise DataError("a null byte", where=f"{self.file}:{line}", fix="save the file as UTF-8")
            try:
                parts.append(self.decoder.decode(chunk, self.ended))
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise DataError(
                    f"not UTF-8: byte {error.object[error.start]:#04x}",
                    where=f"{self.file}:{line}",
                    fix="save the file as UTF-8",
                ) from error
            size += len(parts[-1])
        self.text, self.place = "".join(parts), 0

    def move(self, place: int) -> None:
        """Go on to a place of the text."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def peek(self) -> str:
        """Skip white space; the character that follows, or nothing at the end of the file."""
        while True:
            self.move(BLANK.match(self.text, self.place).end())  # type: ignore[union-attr]
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()

    def take(self) -> str:
        """As `peek`, and go on past it."""
        character = self.peek()
        self.move(self.place + len(character))
        return character

    def value(self) -> Any:
        """Decode the value that begins here, reading on while it is incomplete."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # 16 characters before the end: longer than -Infinity or half of a surrogate pair
                unfinished = "Unterminated" in error.msg or error.pos > len(self.text) - 16
                if self.ended or not unfinished:
                    raise self.fault(error.msg, error.pos) from error
            except ConstantError as error:
                raise _no_number(error, f"{self.file}:{self.line}") from error
            except RecursionError as error:
                raise self.fault("nested too deeply to be a row", self.place) from error
            else:
                self.move(end)
                return value
            self.more()

    def fault(self, what: str, place: int | None = None) -> DataError:
        """A fault at a place of the text."""
        line = self.line + (0 if place is None else self.text.count("\n", self.place, place))
        return DataError(
            f"not valid JSON: {what}",
            where=f"{self.file}:{line}",
            fix="an array of objects, [{...}, {...}], or one a line",
        )


def _read_array(file: pathlib.Path) -> Iterator[Item]:
    text = _Text(file)
    text.take()
    closed = text.peek() == "]"
    if closed:
        text.take()
    while not closed:
        text.peek()
        origin = f"{file}:{text.line}"
        value = text.value()
        try:
            yield _row(value, origin)
        except DataError as fault:
            yield fault
        after = text.take()
        if after not in (",", "]"):
            raise text.fault("Expecting ',' or ']' after a row" if after else "the array is not closed")
        closed = after == "]"
    if text.peek():
        raise text.fault("text after the end of the array")


def _read_csv(file: pathlib.Path) -> Iterator[Item]:
    csv.field_size_limit(MAX_CSV_FIELD)
    header = next(_lines(file), "")
    semicolons = ";" in header and "," not in header and "\t" not in header  # as Excel writes it in much of Europe
    delimiter = "\t" if kind_of(file) == ".tsv" else ";" if semicolons else ","
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    first = 1  # line of a record; quoted fields may hold line breaks
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError("two columns of the header have the same name", where=f"{file}:1")
        first = reader.line_num + 1
        for fields in reader:
            origin = f"{file}:{first}"
            first = reader.line_num + 1
            if len(fields) == len(names):
                yield Row(dict(zip(names, fields, strict=True)), origin)
            elif fields:  # a blank line has none
                yield DataError(
                    f"the row has not as many fields as the header ({', '.join(names)})",
                    where=origin,
                    fix="quote fields that contain commas or line breaks",
                )
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}", where=f"{file}:{first}", fix="close every quote, and double those inside"
        ) from error


def _read_parquet(file: pathlib.Path) -> Iterator[Item]:
    try:
        with _bytes(file) as stream:
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
    text = "".join(_lines(file))
    if text.strip():
        yield Row({"text": text.replace("\r\n", "\n")}, f"{file}:1")


KINDS: dict[str, Callable[[pathlib.Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
