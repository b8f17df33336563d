"""Reads JSON, whatever the suffix: an array of objects, one object per line, or one object that contains the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nybble.data.rows.readers.json_text import Decoder, JsonText, NumberError, number_fault
from nybble.data.rows.readers.lines import beginning, checked, lines
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.row import Item, row_of
from nybble.data.rows.readers.wrapped import Outline, outline_of, read_wrapped
from nybble.errors import DataError
from nybble.files.reading import json_fault


def read_json(file: OpenFile, limit: int) -> Iterator[Item]:
    """Rows and faults of a file.

    Args:
        file: perhaps gzipped.
        limit: characters that a row may have.

    Raises:
        DataError: an object spans several lines, or the rest of an array cannot be read.
    """
    start = beginning(file).decode("utf-8-sig", "ignore")
    head = start.lstrip()
    if head.startswith("[") and not _are_lists(head):
        yield from _read_array(file, limit)
        return
    outline = _outline(file, start, limit) if head.startswith("{") else None
    if outline is not None and outline.row_lists:
        yield from read_wrapped(file, outline, limit)
        return
    if outline is not None:
        outline.refuse_unread(file)
    yield from _read_lines(file, "" if "\r" in start and "\n" not in start else "\n", limit)


def _read_lines(file: OpenFile, newline: str, limit: int) -> Iterator[Item]:
    decoder = Decoder()
    for number, line in lines(file, newline, limit):
        if isinstance(line, str) and line.isspace():
            continue
        origin = f"{file}:{number}"
        try:
            yield row_of(_parse(checked(line, file, number), origin, decoder), origin, decoder.repeated_key())
        except DataError as fault:
            decoder.repeated_key()  # forget a repeated key that it saw before it failed
            yield fault


def _parse(line: str, origin: str, decoder: Decoder) -> Any:
    try:
        return decoder.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {json_fault(error)} at column {error.colno}",
            where=origin,
            fix="one JSON object per line; fix or delete this line",
        ) from error
    except NumberError as error:
        raise number_fault(error, origin) from error
    except RecursionError as error:
        raise DataError("JSON nested too deeply to be a row", where=origin) from error


def _read_array(file: OpenFile, limit: int) -> Iterator[Item]:
    text = JsonText(file, limit)
    text.peek()
    for value, origin in text.elements():
        try:
            yield row_of(value, origin, text.json.repeated_key())
        except DataError as fault:
            yield fault
    if text.peek():
        raise text.fault("text after the end of the array")


def _are_lists(start: str) -> bool:
    """Whether a file has one list per line, so that it is not an array of rows."""
    first, _, rest = start.partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return rest.lstrip().startswith(("[", "{"))


def _outline(file: OpenFile, start: str, limit: int) -> Outline | None:
    """The outline of the first object; None if its own line is not valid JSON, which is reported like any other bad line."""
    try:
        return outline_of(file, limit)
    except DataError as fault:
        first = 1 + start.count("\n", 0, len(start) - len(start.lstrip()))
        more = start.lstrip().partition("\n")[2].lstrip()
        if int(str(fault.where).rpartition(":")[2]) > first and not more.startswith("{"):
            raise
        return None
