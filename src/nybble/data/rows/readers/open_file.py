"""A data file that is opened once: all reads use one descriptor, and its digest is computed from the bytes as they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pathlib
from types import TracebackType
from typing import Any, Self

import xxhash

from nybble.data.rows.readers.kinds import is_gzipped

BUFFER = 1 << 18  # bytes read at a time if a reader asks for less
CHUNK = 1 << 20  # bytes hashed at a time if no reader has asked for them


class OpenFile:
    """A file that can be read from its beginning repeatedly without being opened again.

    Opening it twice would read a slow disk twice, and could give two different files.

    Args:
        path: a regular file, as checked by `refuse_special`.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._raw = io.FileIO(path)
        self._status = os.fstat(self._raw.fileno())
        self._hashed = 0
        """The number of bytes, from the beginning, that `_digests` cover."""
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
    def is_gzipped(self) -> bool:
        """Whether it is gzipped, by its name."""
        return is_gzipped(self.path)

    @property
    def has_changed(self) -> bool:
        """Whether something has written to it since it was opened."""
        now, then = os.fstat(self._raw.fileno()), self._status
        return (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)

    def first(self, size: int) -> bytes:
        """The first bytes of the file, not unpacked."""
        with self.stored() as stream:
            return stream.read(size)

    def stored(self) -> io.BufferedReader:
        """The bytes of the file from the beginning, not unpacked."""
        return io.BufferedReader(_View(self), BUFFER)

    def unpacked(self) -> io.BufferedReader | gzip.GzipFile:
        """The bytes of the file from the beginning, unpacked if it is gzipped."""
        return gzip.GzipFile(fileobj=self.stored(), mode="rb") if self.is_gzipped else self.stored()

    def hash_as_read(self) -> None:
        """Compute the digests from the bytes read from now on; those that were read before are read again at the end."""
        self._digests = self._digests or (hashlib.sha256(), xxhash.xxh3_128())

    def digests(self) -> tuple[str, str]:
        """SHA-256 and XXH3 of the file; bytes that no reader has asked for are read now.

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
        """Fill a buffer from an offset in the file; returns the number of bytes."""
        self._raw.seek(offset)
        count = self._raw.readinto(buffer) or 0
        if self._digests and offset <= self._hashed < offset + count:
            new = memoryview(buffer)[self._hashed - offset : count]
            for digest in self._digests:
                digest.update(new)
            self._hashed = offset + count
        return count


class _View(io.RawIOBase):
    """A stream of a file's bytes with its own offset."""

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
