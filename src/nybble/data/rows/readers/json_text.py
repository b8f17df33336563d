"""Reads a JSON file in chunks: values, and the members of objects and arrays that are too large for memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from nybble.data.rows.readers.lines import pieces, utf8_fix
from nybble.data.rows.readers.open_file import CHUNK, OpenFile
from nybble.data.rows.readers.row import MAX_ROW, too_large
from nybble.errors import DataError
from nybble.files.reading import json_fault

LONGEST_NUMBER = 4300  # digits of an integer: Python refuses more, since reading them takes quadratic time
LONGEST_TOKEN = 16  # characters: more than -Infinity, half of a surrogate pair, or the end of a number after its digits
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class NumberError(ValueError):
    """A number that Python's json accepts but a row cannot contain; the message is the fault."""


def _refuse_constant(name: str) -> NoReturn:
    raise NumberError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > LONGEST_NUMBER:
        raise NumberError(f"an integer of {count:,} digits; {LONGEST_NUMBER:,} is the limit")
    return int(digits)


class Decoder(json.JSONDecoder):
    """The standard decoder, which also reports a key that appears twice in an object."""

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
        """The first repeated key since the last call."""
        name, self._repeated = self._repeated, None
        return name


def number_fault(error: NumberError, origin: str) -> DataError:
    """The fault of a number that a row cannot contain."""
    return DataError(str(error), where=origin, fix="write it as text, or null for nothing")


class JsonText:
    """A file's text from the current position on, as much of it as has been read.

    Args:
        file: perhaps gzipped.
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
        """The line of `position`."""
        self.size = 0
        """The characters of the last value."""
        self.at_end = False

    def read_more(self) -> None:
        """Read another chunk, or as much as there is already, so that a long row is not decoded many times."""
        parts, size, wanted = [self.text[self.position :]], 0, max(1, len(self.text) - self.position)
        while size < wanted and not self.at_end:
            chunk = next(self.chunks, b"")
            self.at_end = not chunk
            line = self.line + sum(part.count("\n") for part in parts)
            if b"\0" in chunk:
                line += chunk.count(b"\n", 0, chunk.index(b"\0"))
                raise DataError("a null byte", where=f"{self.file}:{line}", fix="save the file as UTF-8")
            try:
                parts.append(self.decoder.decode(chunk, self.at_end))
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise DataError(
                    f"not UTF-8: byte {error.object[error.start]:#04x}",
                    where=f"{self.file}:{line}",
                    fix=utf8_fix(self.file, "WINDOWS-1252"),
                ) from error
            size += len(parts[-1])
        self.text, self.position = "".join(parts), 0

    def advance(self, position: int) -> None:
        """Move to a position in the text."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek(self) -> str:
        """Skip white space; returns the next character, or "" at the end of the file."""
        while True:
            self.advance(WHITE_SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def take(self) -> str:
        """As `peek`, but move past the character."""
        character = self.peek()
        self.advance(self.position + len(character))
        return character

    def value(self) -> Any:
        """Decode the value at the current position, reading further while it is incomplete."""
        self.json.repeated_key()  # forget that of a value that was incomplete
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                unfinished = "Unterminated" in error.msg or error.pos > len(self.text) - LONGEST_TOKEN
                if self.at_end or not unfinished:
                    raise self.fault(json_fault(error), error.pos) from error
            except NumberError as error:
                raise number_fault(error, f"{self.file}:{self.line}") from error
            except RecursionError as error:
                raise self.fault("nested too deeply to be a row", self.position) from error
            else:
                may_continue = isinstance(value, int | float) and end > len(self.text) - LONGEST_TOKEN
                if self.at_end or not may_continue:
                    if end - self.position > self.limit:
                        raise too_large("a row", self.limit, f"{self.file}:{self.line}", end - self.position)
                    self.size = end - self.position
                    self.advance(end)
                    return value
            if len(self.text) - self.position > self.limit:
                raise too_large("a row", self.limit, f"{self.file}:{self.line}")
            self.read_more()

    def elements(self) -> Iterator[tuple[Any, str]]:
        """The elements of the array at the current position, each with its line and, if several share a line, its number."""
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
        """The names in the object at the current position; the value of each must be read before the next name."""
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
