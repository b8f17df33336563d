"""A JSON file's text, walked through in pieces: values, and the members of objects and arrays too large to hold."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from nybble.data.rows.readers.lines import as_utf8, pieces
from nybble.data.rows.readers.open_file import CHUNK, OpenFile
from nybble.data.rows.readers.row import MAX_ROW, too_large
from nybble.errors import DataError
from nybble.files.reading import json_fault

LONGEST_NUMBER = 4300  # digits of an integer: more are read in quadratic time, so Python refuses them
LONGEST_SIGN = 16  # characters: longer than -Infinity, half of a surrogate pair, or what follows a number's digits
BLANK = re.compile(r"[ \t\r\n]*")


class NumberError(ValueError):
    """What Python's json reads or writes as a number and a row cannot have; the message is the fault."""


def _refuse_constant(name: str) -> NoReturn:
    raise NumberError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > LONGEST_NUMBER:
        raise NumberError(f"an integer of {count:,} digits; {LONGEST_NUMBER:,} is the limit")
    return int(digits)


class Decoder(json.JSONDecoder):
    """JSON's own, which also says which key the objects of a value have twice."""

    def __init__(self) -> None:
        self._repeated: str | None = None
        super().__init__(parse_constant=_refuse_constant, parse_int=_integer, object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs) and self._repeated is None:
            seen: set[str] = set()
            self._repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        return values

    def repeated_key(self) -> str | None:
        """The first such key since this was last asked for."""
        name, self._repeated = self._repeated, None
        return name


def no_number(error: NumberError, origin: str) -> DataError:
    """The fault of a number that a row cannot have."""
    return DataError(str(error), where=origin, fix="write it as text, or null for nothing")


class JsonText:
    """A file's text from the reader's position on, as much of it as was asked for.

    Args:
        file: perhaps packed.
        limit: characters that a value may have.
    """

    def __init__(self, file: OpenFile, limit: int = MAX_ROW) -> None:
        self.limit = limit
        self.json = Decoder()
        self.chunks = pieces(file, CHUNK)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.file = file
        self.text = ""
        self.position = 0
        self.line = 1
        """Of `position`."""
        self.size = 0
        """Characters of the last value."""
        self.ended = False

    def more(self) -> None:
        """Read another chunk, or as much as there is already: a long row is not decoded again and again."""
        parts, size, wanted = [self.text[self.position :]], 0, max(1, len(self.text) - self.position)
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
                    fix=as_utf8(self.file, "WINDOWS-1252"),
                ) from error
            size += len(parts[-1])
        self.text, self.position = "".join(parts), 0

    def advance(self, position: int) -> None:
        """Go on to a position in the text."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek(self) -> str:
        """Skip white space; the character that follows, or nothing at the end of the file."""
        while True:
            self.advance(BLANK.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more()

    def take(self) -> str:
        """As `peek`, and go on past it."""
        character = self.peek()
        self.advance(self.position + len(character))
        return character

    def value(self) -> Any:
        """Decode the value that begins here, reading on while it is incomplete."""
        self.json.repeated_key()  # of a value that was not complete yet
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                unfinished = "Unterminated" in error.msg or error.pos > len(self.text) - LONGEST_SIGN
                if self.ended or not unfinished:
                    raise self.fault(json_fault(error), error.pos) from error
            except NumberError as error:
                raise no_number(error, f"{self.file}:{self.line}") from error
            except RecursionError as error:
                raise self.fault("nested too deeply to be a row", self.position) from error
            else:
                may_go_on = isinstance(value, int | float) and end > len(self.text) - LONGEST_SIGN
                if self.ended or not may_go_on:
                    if end - self.position > self.limit:
                        raise too_large("a row", self.limit, f"{self.file}:{self.line}", end - self.position)
                    self.size = end - self.position
                    self.advance(end)
                    return value
            if len(self.text) - self.position > self.limit:
                raise too_large("a row", self.limit, f"{self.file}:{self.line}")
            self.more()

    def elements(self) -> Iterator[tuple[Any, str]]:
        """The elements of the array that begins here, each with its line, and where that is not enough its number."""
        self.take()
        closed = self.peek() == "]"
        if closed:
            self.take()
        number, last = 0, 0
        while not closed:
            self.peek()
            number += 1
            origin = f"{self.file}:{self.line}" + (f", row {number}" if self.line == last else "")
            last = self.line
            yield self.value(), origin
            after = self.take()
            if after not in (",", "]"):
                raise self.fault("Expecting ',' or ']' after a row" if after else "the array is not closed")
            closed = after == "]"

    def members(self) -> Iterator[str]:
        """The names of the object that begins here; read the value of each before asking for the next."""
        self.take()
        closed = self.peek() == "}"
        if closed:
            self.take()
        while not closed:
            if self.peek() != '"':
                raise self.fault("Expecting property name enclosed in double quotes")
            name: str = self.value()
            if self.take() != ":":
                raise self.fault("Expecting ':' delimiter")
            yield name
            after = self.take()
            if after not in (",", "}"):
                raise self.fault("Expecting ',' delimiter" if after else "the object is not closed")
            closed = after == "}"

    def fault(self, what: str, position: int | None = None) -> DataError:
        """A fault at a position in the text."""
        line = self.line + (0 if position is None else self.text.count("\n", self.position, position))
        return DataError(
            f"not valid JSON: {what}",
            where=f"{self.file}:{line}",
            fix="an array of objects, [{...}, {...}], or one per line",
        )
