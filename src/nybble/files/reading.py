"""Text and JSON from a disk; whatever is wrong with a file, one sentence says what and where."""

from __future__ import annotations

import json
import pathlib
import re
import reprlib
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nybble.errors import ModelError, NybbleError
from nybble.files.expectations import expectation
from nybble.files.lfs import pointer_fault

LARGEST = 64 << 20  # bytes: the index of a model of 400 billion parameters has 5 million
AGAIN = "copy or download it again"
RESTORE = "restore it from a copy of the run"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Shape(BaseModel):
    """The fields that an object must have, with their types; further fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


S = TypeVar("S", bound=Shape)


def check_regular(file: pathlib.Path, kind: type[NybbleError], fix: str) -> None:
    """Refuse what is not a regular file: a folder, or a pipe or a device, which could be read forever.

    Raises:
        NybbleError: of this kind.
    """
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        raise kind(f"there is no {file.name}", where=str(file.parent), fix=fix) from error
    except OSError as error:
        raise kind(f"{file.name} cannot be read: {_lower(error.strerror)}", where=str(file), fix=fix) from error
    if not stat.S_ISREG(mode):
        raise kind(f"{file.name} is {KINDS[stat.S_IFMT(mode)]}, not a file", where=str(file), fix=fix)


def read_text(
    file: pathlib.Path, kind: type[NybbleError] = ModelError, fix: str = AGAIN, largest: int | None = LARGEST
) -> str:
    """A file's text.

    Args:
        file: the file.
        kind: of the error.
        fix: what to do where it is damaged.
        largest: bytes that it may have at most, None for any number.

    Raises:
        NybbleError: of this kind: there is no such file, it is not a regular file, it is too large or a git-lfs pointer, it
            cannot be read, or it is not UTF-8.
    """
    content = _read_bytes(file, kind, fix, largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise kind(f"{file.name} is not UTF-8: {_byte(error)}", where=f"{file}:{line}", fix=fix) from error


def _read_bytes(file: pathlib.Path, kind: type[NybbleError], fix: str, largest: int | None) -> bytes:
    check_regular(file, kind, fix)
    try:
        size = file.stat().st_size
        if largest is not None and size > largest:
            what = f"{file.name} has {size:,} bytes; the limit for such a file is {largest:,}"
            raise kind(what, where=str(file), fix=fix)
        if (fault := pointer_fault(file)) is not None:
            raise kind(fault[0], where=str(file), fix=fault[1])
        return file.read_bytes()
    except OSError as error:
        raise kind(f"{file.name} cannot be read: {_lower(error.strerror)}", where=str(file), fix=fix) from error


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x}"


def read_object(
    file: pathlib.Path, kind: type[NybbleError] = ModelError, fix: str = AGAIN, largest: int | None = LARGEST
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: the file.
        kind: of the error.
        fix: what to do where the file is damaged.
        largest: bytes that it may have at most, None for any number.

    Raises:
        NybbleError: of this kind: the file cannot be read, or it contains no object.
    """
    text = read_text(file, kind, fix, largest)
    if not text.strip("\0 \r\n\t"):
        raise kind(f"{file.name} is empty", where=str(file), fix=fix)
    try:
        return _parse_object(text, file.name)
    except _JsonError as error:
        raise kind(error.what, where=f"{file}:{error.line}" if error.line else str(file), fix=fix) from error


def read_shape(
    file: pathlib.Path, shape: type[S], kind: type[NybbleError], fix: str, largest: int | None = LARGEST
) -> S:
    """The object in a JSON file, validated against the fields that it must have.

    Args:
        file: the file.
        shape: the fields that the object must have.
        kind: of the error.
        fix: what to do where the file is damaged.
        largest: bytes that it may have at most, None for any number.

    Raises:
        NybbleError: of this kind: the file cannot be read, contains no object, or the object does not have these fields.
    """
    return as_shape(read_object(file, kind, fix, largest), file, shape, kind, fix)


def as_shape(value: Mapping[str, Any], file: pathlib.Path, shape: type[S], kind: type[NybbleError], fix: str) -> S:
    """An object that was read from a file, validated against the fields that it must have.

    Raises:
        NybbleError: of this kind: a field is missing, or of another type.
    """
    try:
        return _validated(value, file.name, shape)
    except _JsonError as error:
        raise kind(error.what, where=str(file), fix=fix) from error


def read_lines(file: pathlib.Path, shape: type[S], kind: type[NybbleError]) -> Iterator[S | NybbleError]:
    """The objects of a file that has one per line, and an error for each line without one; nothing if the file is missing.

    Raises:
        NybbleError: of this kind: the file as a whole cannot be read.
    """
    if not file.exists():
        return
    for number, line in enumerate(_read_bytes(file, kind, RESTORE, None).split(b"\n"), 1):
        what = ""
        try:
            if line.strip():
                yield _validated(_parse_object(line.decode("utf-8"), file.name), file.name, shape)
        except UnicodeDecodeError as error:
            what = f"{file.name} is not UTF-8: {_byte(error)}"
        except _JsonError as error:
            what = error.what
        if what:
            fix = f"{RESTORE}, or remove this line: sed -i {number}d {shlex.quote(str(file))}"
            yield kind(what, where=f"{file}:{number}", fix=fix)


class _JsonError(ValueError):
    """What is wrong with a text, and in which line; 0 if it is not one line."""

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


def _parse_object(text: str, name: str) -> dict[str, Any]:
    """The object that a text contains.

    Args:
        text: JSON.
        name: the name of its file, for the message.

    Raises:
        _JsonError: its text says what is wrong.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _JsonError(f"{name} is not valid JSON: {json_fault(error)}", error.lineno) from error
    except RecursionError as error:
        raise _JsonError(f"{name} is nested too deeply") from error
    except ValueError as error:  # Python refuses integers with more digits
        most = sys.get_int_max_str_digits()
        long = re.search(rf"\d{{{most + 1},}}", text)
        line = text[: long.start()].count("\n") + 1 if long else 0
        raise _JsonError(f"{name} has a number of more than {most:,} digits", line) from error
    if not isinstance(value, dict):
        raise _JsonError(f"{name} is not a JSON object")
    return value


def _validated(value: Mapping[str, Any], name: str, shape: type[S]) -> S:
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        raise _JsonError(_mismatch(error, name)) from error


def json_fault(error: json.JSONDecodeError) -> str:
    """Python's message about text that is not JSON, without the preposition that introduces the position."""
    return error.msg.removesuffix(" at").removesuffix(" starting")


def _mismatch(error: ValidationError, name: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{name} has no {key}"
    return f"{key} in {name}: {expectation(first)}, not {brief(first['input'])}"


def brief(value: object) -> str:
    """A value as Python writes it, shortened: with YAML aliases, a few lines can expand to gigabytes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    short.maxlist = short.maxdict = short.maxlevel = 6
    return short.repr(value)


def _lower(text: str | None) -> str:
    return f"{text[:1].lower()}{text[1:]}" if text else "for an unknown reason"
