"""JSON files: an array of objects, or an object on each line."""

from __future__ import annotations

import codecs
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from nybble.data.readers.row import Item, Row
from nybble.data.readers.text import CHUNK, decoded, pieces, raw_lines
from nybble.errors import DataError

BLANK = re.compile(r"[ \t\r\n]*")


def read_jsonl(file: pathlib.Path) -> Iterator[Item]:
    for number, line in raw_lines(file):
        if not line.strip():
            continue
        origin = f"{file}:{number}"
        try:
            yield _row(_parse(decoded(line, origin), origin), origin)
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


def read_json(file: pathlib.Path) -> Iterator[Item]:
    """An array of objects, decoded one by one so that each keeps its line; a file of JSON lines is read as such."""
    start = next((piece.lstrip() for piece in pieces(file, lambda stream: stream.read(CHUNK)) if piece.strip()), b"")
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
        yield from read_jsonl(file)


class _Text:
    """A file's text from where the reader stands, as much of it as was asked for."""

    def __init__(self, file: pathlib.Path) -> None:
        self.chunks = pieces(file, lambda stream: stream.read(CHUNK))
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
