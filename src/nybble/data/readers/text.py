"""A file as text: unpacked, in pieces or in lines, and what is wrong where it is not UTF-8."""

from __future__ import annotations

import codecs
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from nybble.errors import DataError

CHUNK = 1 << 20  # bytes of a file read at a time where lines do not matter


def kind_of(file: pathlib.Path) -> str:
    """The suffix that says what a file holds."""
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def opened(file: pathlib.Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def pieces(file: pathlib.Path, read: Callable[[IO[bytes]], bytes]) -> Iterator[bytes]:
    """A file piece by piece, unpacked and without a byte order mark."""
    line = 1
    with opened(file) as stream:
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


def raw_lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers."""
    for number, line in enumerate(pieces(file, lambda stream: stream.readline()), 1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _refuse_utf16(start: bytes, file: pathlib.Path) -> None:
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            "the file is UTF-16, not UTF-8", where=f"{file}:1", fix=f"iconv -f UTF-16 -t UTF-8 {file} > NEW"
        )


def decoded(line: bytes, origin: str) -> str:
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


def lines(file: pathlib.Path) -> Iterator[str]:
    for number, line in raw_lines(file):
        yield decoded(line, f"{file}:{number}")
