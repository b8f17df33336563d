"""A data file, opened once: every look at it is a view of one descriptor, and its digest is taken of the bytes as they pass."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pathlib
from types import TracebackType
from typing import Any, Self

import xxhash

from nybble.data.rows.readers.kinds import is_packed

BUFFER = 1 << 18  # bytes that a view reads at a time where a reader asks for less
CHUNK = 1 << 20  # bytes that are hashed at a time where no reader has asked for them


class OpenFile:
    """A file that is read from its beginning as often as a reader needs, without being opened again.

    Opening twice would read a slow disk twice, and could find two different files.

    Args:
        path: a regular file; `refuse_special` says so beforehand.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._raw = io.FileIO(path)
        self._status = os.fstat(self._raw.fileno())
        self._hashed = 0
        """Bytes from the beginning that `_digests` are of."""
        self._digests: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def status(self) -> os.stat_result:
        """Size and times when it was opened."""
        return self._status

    @property
    def is_packed(self) -> bool:
        """Whether it is gzip's, by its name."""
        return is_packed(self.path)

    @property
    def has_changed(self) -> bool:
        """Whether something has written to it since it was opened."""
        now, then = os.fstat(self._raw.fileno()), self._status
        return (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)

    def first(self, size: int) -> bytes:
        """The first bytes as they are in the file."""
        with self.stored() as stream:
            return stream.read(size)

    def stored(self) -> io.BufferedReader:
        """The bytes of the file, from the beginning."""
        return io.BufferedReader(_View(self), BUFFER)

    def unpacked(self) -> io.BufferedReader | gzip.GzipFile:
        """The bytes of the file, those of a packed one unpacked, from the beginning."""
        return gzip.GzipFile(fileobj=self.stored(), mode="rb") if self.is_packed else self.stored()

    def hash_as_read(self) -> None:
        """From now on take the digests of the bytes that pass; those that have passed already are read again at the end."""
        self._digests = self._digests or (hashlib.sha256(), xxhash.xxh3_128())

    def digests(self) -> tuple[str, str]:
        """SHA-256 and XXH3 of the file; what no reader has asked for is read now.

        Raises:
            OSError: it cannot be read.
        """
        self.hash_as_read()
        buffer = bytearray(CHUNK)
        while self.read_at(self._hashed, buffer):
            pass
        sha256, xxh3 = self._digests
        return sha256.hexdigest(), xxh3.hexdigest()

    def read_at(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill a buffer from an offset in the file; how many bytes there were."""
        self._raw.seek(offset)
        count = self._raw.readinto(buffer) or 0
        if self._digests and offset <= self._hashed < offset + count:
            new = memoryview(buffer)[self._hashed - offset : count]
            for digest in self._digests:
                digest.update(new)
            self._hashed = offset + count
        return count


class _View(io.RawIOBase):
    """The bytes of a file from an offset of its own."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__()
        self._file = file
        self._offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._file.status.st_size}[whence]
        self._offset = base + offset
        return self._offset

    def readinto(self, buffer: Any) -> int:
        count = self._file.read_at(self._offset, buffer)
        self._offset += count
        return count
