"""The uncompressed sizes of a parquet file's pages, read from their headers before any page is uncompressed.

Arrow allocates the sizes in the headers, so these are compared with a limit first; the file's totals are stored elsewhere and may
be wrong. Headers use Thrift's compact protocol: fields by number, integers with seven bits per byte.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow

HEADERS = (1 << 12, 1 << 24)  # bytes to read for a header: nearly always enough, and Arrow's own limit
PAGE_TYPE, UNCOMPRESSED_SIZE, COMPRESSED_SIZE = 1, 2, 3  # numbers of a page header's fields
DICTIONARY_PAGE = 2  # a page type
DATA, DICTIONARY, DATA_2 = 5, 7, 8  # fields that describe a data page, a dictionary, a data page of version 2
VALUES, ENCODING = 1, {DATA: 2, DATA_2: 4}  # numbers of their fields
DICTIONARY_ENCODINGS = (2, 8)  # encodings of pages whose values are in the dictionary
CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd"}
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
MAX_DEPTH = 8  # structs inside each other


@dataclass(frozen=True)
class Page:
    """One page of a column: values, or the dictionary that other pages refer to."""

    size: int
    """Bytes when uncompressed."""
    values: int
    is_dictionary: bool
    uses_dictionary: bool
    """Whether the values are in the dictionary."""
    offset: int
    """The offset of the first byte after its header."""
    compressed: int
    """Bytes in the file."""


def pages(stream: IO[bytes], start: int, size: int) -> Iterator[Page]:
    """The pages of a column chunk.

    Args:
        stream: the file.
        start: offset of the first page.
        size: bytes of all pages with their headers.

    Raises:
        ValueError: what is found is not a page.
    """
    offset = start
    while offset < start + size:
        length, header = _header(stream, offset)
        size_in_memory = header.numbers.get(UNCOMPRESSED_SIZE, -1)
        compressed = header.numbers.get(COMPRESSED_SIZE, -1)
        if size_in_memory < 0 or compressed < 0:
            raise ValueError(f"no page at byte {offset}")
        kinds = {kind: header.structs[kind].numbers for kind in (DATA, DICTIONARY, DATA_2) if kind in header.structs}
        yield Page(
            size_in_memory,
            max((kind.get(VALUES, 0) for kind in kinds.values()), default=0),
            header.numbers.get(PAGE_TYPE) == DICTIONARY_PAGE,
            any(
                kinds[kind].get(encoding) in DICTIONARY_ENCODINGS
                for kind, encoding in ENCODING.items()
                if kind in kinds
            ),
            offset + length,
            compressed,
        )
        offset += length + compressed


def longest_text(stream: IO[bytes], dictionary: Page, compression: str) -> int:
    """Bytes of the longest text in a dictionary; of the whole dictionary if that is unknown.

    Args:
        stream: the file.
        dictionary: a page that is small enough to be uncompressed.
        compression: parquet's name of its compression.
    """
    stream.seek(dictionary.offset)
    data = stream.read(min(dictionary.compressed, 2 * dictionary.size + HEADERS[0]))
    try:
        if compression != "UNCOMPRESSED":
            data = pyarrow.Codec(CODECS[compression]).decompress(data, dictionary.size, asbytes=True)
    except (KeyError, OSError, pyarrow.ArrowException):  # Arrow will report what is wrong with it
        return dictionary.size
    longest = offset = 0
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 4], "little")
        longest = max(longest, length)
        offset += 4 + length
    return longest if offset == len(data) == dictionary.size else dictionary.size


@dataclass
class _Fields:
    """A struct's fields by their numbers."""

    numbers: dict[int, int] = field(default_factory=dict)
    structs: dict[int, _Fields] = field(default_factory=dict)


def _header(stream: IO[bytes], offset: int) -> tuple[int, _Fields]:
    """The length and the fields of the header at an offset."""
    for size in HEADERS:
        stream.seek(offset)
        header = _Header(io.BytesIO(stream.read(size)))
        try:
            fields = header.struct()
        except EOFError:
            continue
        return header.stream.tell(), fields
    raise ValueError(f"the header of the page at byte {offset} is cut off")


@dataclass
class _Header:
    stream: io.BytesIO

    def struct(self, depth: int = 0) -> _Fields:
        if depth > MAX_DEPTH:
            raise ValueError("a page's header is nested too deeply")
        fields = _Fields()
        number = 0
        while (byte := self._byte()) != 0:
            kind = byte & 15
            number = number + (byte >> 4) if byte >> 4 else self._signed()
            if kind == STRUCT:
                fields.structs[number] = self.struct(depth + 1)
            elif kind not in BOOLEANS:
                fields.numbers[number] = self._value(kind, depth)
        return fields

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
