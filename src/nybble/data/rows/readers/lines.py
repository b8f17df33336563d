"""Reads a file as text: unpacked, in pieces or lines, with the faults of what is not UTF-8."""

from __future__ import annotations

import gzip
import io
import pathlib
import re
import shlex
import zlib
from collections.abc import Iterator

from nybble.data.rows.readers.kinds import is_gzipped
from nybble.data.rows.readers.open_file import CHUNK, OpenFile
from nybble.data.rows.readers.row import MAX_ROW, too_large
from nybble.errors import DataError

START = 1 << 16  # first bytes, which show the layout of a file
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)  # raised by a damaged gzip file
WIDE_ENCODINGS = {  # encodings with several bytes per character, by byte order mark or by two ASCII characters; longer ones first
    re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"): "UTF-32",
    re.compile(rb"\xff\xfe|\xfe\xff"): "UTF-16",
    re.compile(rb"[^\0]\0\0\0"): "UTF-32LE",
    re.compile(rb"\0\0\0[^\0]"): "UTF-32BE",
    re.compile(rb"[^\0]\0[^\0]\0"): "UTF-16LE",
    re.compile(rb"\0[^\0]\0[^\0]"): "UTF-16BE",
}


def pieces(file: OpenFile, size: int) -> Iterator[bytes]:
    """A file's unpacked bytes, in pieces.

    Raises:
        DataError: the file cannot be unpacked, or is not UTF-8.
    """
    line = 1
    with file.unpacked() as stream:
        while True:
            try:
                piece = stream.read(size)
            except GZIP_ERRORS as error:
                raise _gzip_fault(error, file, line) from error
            if not piece:
                return
            if line == 1:
                refuse_wide(piece, file)
            line += piece.count(b"\n")
            yield piece


def lines(file: OpenFile, newline: str = "\n", limit: int = MAX_ROW) -> Iterator[tuple[int, str | DataError]]:
    """A file's lines with their numbers; they still have to pass `checked`.

    Args:
        file: perhaps gzipped.
        newline: what ends a line; "" is a line feed, a carriage return, or both.
        limit: characters that a line may have; a fault replaces a longer line.

    Raises:
        DataError: the rest of the file cannot be unpacked, or the file has another encoding.
    """
    refuse_wide(beginning(file, 4), file)
    number = 0
    # Bytes that are not UTF-8 become surrogates here, so that one bad line does not affect its neighbours.
    with file.unpacked() as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline) as text:
        try:
            while line := text.readline(limit + 1):
                number += 1
                yield (
                    number,
                    line if len(line) <= limit else too_large("a line", limit, f"{file}:{number}", _skip(text, line)),
                )
        except GZIP_ERRORS as error:
            raise _gzip_fault(error, file, number + 1) from error


def _skip(text: io.TextIOWrapper, line: str) -> int:
    """Skip the rest of a line of which the beginning was read; returns its number of characters."""
    size = len(line)
    while not line.endswith(("\n", "\r")) and (line := text.readline(CHUNK)):
        size += len(line)
    return size


def beginning(file: OpenFile, size: int = START) -> bytes:
    """A file's first unpacked bytes, as many as there are and can be read."""
    start = bytearray()
    with file.unpacked() as stream:
        try:
            while len(start) < size and (piece := stream.read1(size - len(start))):
                start += piece
        except GZIP_ERRORS:  # the reader will get the error again, and report it with its line
            pass
    return bytes(start)


def checked(line: str | DataError, file: OpenFile, number: int) -> str:
    """The line, once it is known to be valid text.

    Raises:
        DataError: it is too long, or contains a null byte or a byte that is not UTF-8.
    """
    if isinstance(line, DataError):
        raise line
    if "\0" in line:
        raise DataError(
            "a null byte, as in a damaged or a UTF-16 file", where=f"{file}:{number}", fix="save the file as UTF-8"
        )
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte, position = ord(line[error.start]) & 0xFF, len(line[: error.start].encode()) + 1
            raise DataError(
                f"not UTF-8: byte {byte:#04x} at position {position} of the line",
                where=f"{file}:{number}",
                fix=utf8_fix(file, "WINDOWS-1252"),
            ) from error
    return line


def read_document(file: OpenFile, limit: int = MAX_ROW) -> str:
    """A whole file as text, with line feeds at the ends of its lines.

    Args:
        file: perhaps gzipped.
        limit: characters that it may have.

    Raises:
        DataError: it is not UTF-8, or too long.
    """
    parts, size = [], 0
    for number, line in lines(file, limit=limit):
        text = checked(line, file, number)
        size += len(text)
        if size <= limit:
            parts.append(text)
        else:  # only the length is needed now
            parts.clear()
    if size > limit:
        raise too_large("a text", limit, str(file), size)
    return "".join(parts).replace("\r\n", "\n").replace("\r", "\n")


def refuse_wide(start: bytes, file: OpenFile) -> None:
    """Refuse a file whose first bytes show that its encoding is UTF-16 or UTF-32.

    Raises:
        DataError: it is.
    """
    name = next((name for mark, name in WIDE_ENCODINGS.items() if mark.match(start)), None)
    if name is not None:
        raise DataError(f"the file is {name}, not UTF-8", where=f"{file}:1", fix=utf8_fix(file, name))


def command_on(command: str, path: pathlib.Path) -> str:
    """A shell command with a file as its last argument, or with the content of a gzipped file as its input."""
    name = shlex.quote(str(path))
    return f"gzip -dc {name} | {command}" if is_gzipped(path) else f"{command} {name}"


def utf8_fix(file: OpenFile, encoding: str) -> str:
    """The command that converts a file to UTF-8."""
    command = command_on(f"iconv -f {encoding} -t UTF-8", file.path) + " > NEW"
    return command if encoding.startswith("UTF") else f"save it as UTF-8; if it comes from Windows: {command}"


def _gzip_fault(error: Exception, file: OpenFile, line: int) -> DataError:
    if isinstance(error, EOFError):
        return DataError("the gzip file is truncated", where=f"{file}:{line}", fix="copy or download it again")
    return DataError(
        f"the file cannot be unpacked: {error}",
        where=f"{file}:{line}",
        fix=f"gzip -t {shlex.quote(str(file))} tests it; copy or download it again",
    )
