"""What a parquet file's pages unpack to, told by their headers before any is unpacked.

A header's sizes are what Arrow allocates, so they are held against a limit first: the file's own totals stand in another
place and need not be true. Headers are in Thrift's compact protocol: fields by number, integers in seven bits a byte.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

HEADERS = (1 << 12, 1 << 24)  # bytes that are read for one: nearly always enough, and Arrow's own limit
UNPACKED, PACKED = 2, 3  # numbers of a page header's fields
COUNTING = (
    5,
    7,
    8,
)  # numbers of the fields that say how many values are in a data page, a dictionary, a data page of version 2
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
DEEPEST = 8  # structs inside each other


@dataclass(frozen=True)
class Page:
    """One page of a column: its own values, or the dictionary that others refer to."""

    size: int
    """Bytes, unpacked."""
    values: int


def pages(stream: IO[bytes], start: int, size: int) -> Iterator[Page]:
    """The pages of a part of a column.

    Args:
        stream: the file.
        start: where the first one begins.
        size: bytes of all of them, with their headers.

    Raises:
        ValueError: what is there is not a page.
    """
    place = start
    while place < start + size:
        length, numbers = _header(stream, place)
        unpacked, packed = numbers.get(UNPACKED, -1), numbers.get(PACKED, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError(f"no page at byte {place}")
        yield Page(unpacked, max((numbers.get(field, 0) for field in COUNTING), default=0))
        place += length + packed


def _header(stream: IO[bytes], place: int) -> tuple[int, dict[int, int]]:
    """How long the header is that stands there, and its integers."""
    for size in HEADERS:
        stream.seek(place)
        header = _Header(io.BytesIO(stream.read(size)))
        try:
            numbers = header.struct()
        except EOFError:
            continue
        return header.stream.tell(), numbers
    raise ValueError(f"the header of the page at byte {place} is cut off")


@dataclass
class _Header:
    stream: io.BytesIO

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The integers of a struct by their fields' numbers; of a struct within it, its first integer."""
        if depth > DEEPEST:
            raise ValueError("a page's header is nested too deeply")
        found: dict[int, int] = {}
        number = 0
        while (byte := self._byte()) != 0:
            kind = byte & 15
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            if kind == STRUCT:
                found[number] = self.struct(depth + 1).get(1, 0)
            elif kind not in BOOLEANS:
                found[number] = self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> int:
        if kind in INTEGERS:
            return self._signed()
        if kind == BYTE or kind in BOOLEANS:
            return self._byte()
        if kind == DOUBLE:
            self.stream.seek(8, io.SEEK_CUR)
        elif kind == BINARY:
            self.stream.seek(min(self._unsigned(), HEADERS[-1]), io.SEEK_CUR)
        elif kind in LISTS:
            byte = self._byte()
            count = byte >> 4 if byte >> 4 < 15 else self._unsigned()
            for _ in range(count):
                if byte & 15 == STRUCT:
                    self.struct(depth + 1)
                else:
                    self._value(byte & 15, depth)
        else:
            raise ValueError(f"a page's header has a field of kind {kind}")
        return 0

    def _byte(self) -> int:
        byte = self.stream.read(1)
        if not byte:
            raise EOFError
        return byte[0]

    def _unsigned(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a page's header has a number that is too long")

    def _signed(self) -> int:
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)
