"""SHA-256 of data files: remembered from an earlier run, or taken of the bytes while their rows are read."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator

from nybble.data.rows.readers import OpenFile, refuse_special, unreadable
from nybble.errors import DataError
from nybble.files.cached_digests import is_unchanged, recall, remember


class FileDigests:
    """The digests of all files that a recipe's data consist of.

    Args:
        files: all of them.
        notes: folder in the cache where digests are remembered.
    """

    def __init__(self, files: Iterable[pathlib.Path], notes: pathlib.Path) -> None:
        self._notes = notes
        self._earlier = {file: recall(file, notes) for file in files}
        self._known: dict[pathlib.Path, str] = {}
        self._marks: dict[pathlib.Path, tuple[int, int]] = {}
        """By which a file is known for the one whose digest was taken."""
        self._reading: OpenFile | None = None

    @contextlib.contextmanager
    def reading(self, file: OpenFile) -> Iterator[None]:
        """While all rows of a file are read: its bytes are hashed as they pass, unless it is as it was in an earlier run.

        Raises:
            DataError: the file cannot be read, or its rows may not be those of its digest.
        """
        self._begin(file)
        try:
            yield
            self._end(file)
        finally:
            self._reading = None

    def _begin(self, file: OpenFile) -> None:
        self._reading = file
        earlier = self._earlier[file.path]
        if file.path in self._known:
            self._refuse_changed(file)
        elif earlier is not None and is_unchanged(earlier, file.status):
            self._know(file.path, earlier["sha256"], file.status)
        else:
            file.hash_as_read()

    def _end(self, file: OpenFile) -> None:
        if file.path not in self._known:
            self._hash(file)
        self._refuse_changed(file)

    def _refuse_changed(self, file: OpenFile) -> None:
        """Refuse a file that is not as it was when its digest was taken: its rows may be others."""
        if file.has_changed or _mark(file.status) != self._marks[file.path]:
            raise DataError(
                "the file changed while it was being read",
                where=str(file),
                fix="run the command again when nothing writes to the file",
            )

    def found(self) -> dict[pathlib.Path, str] | None:
        """The digests before all rows have been read: None if one of the files was never read before.

        Nothing can be in the cache for such a file, so there is no use in reading it only for its digest.

        Raises:
            DataError: a file cannot be read.
        """
        if any(earlier is None and file not in self._known for file, earlier in self._earlier.items()):
            return None
        return self.all()

    def all(self) -> dict[pathlib.Path, str]:
        """The digest of every file; what is not known yet is read now.

        Raises:
            DataError: a file cannot be read.
        """
        for file in self._earlier:
            if file not in self._known:
                self._find(file)
        return self._known

    def _find(self, path: pathlib.Path) -> None:
        if self._reading is not None and self._reading.path == path:
            self._hash(self._reading)
            return
        refuse_special(path)
        try:
            earlier, status = self._earlier[path], path.stat()
            if earlier is not None and is_unchanged(earlier, status):
                self._know(path, earlier["sha256"], status)
                return
            file = OpenFile(path)
        except OSError as error:
            raise unreadable(path, error) from error
        with file:
            self._hash(file)

    def _hash(self, file: OpenFile) -> None:
        try:
            sha256, xxh3 = file.digests()
        except OSError as error:
            raise unreadable(file.path, error) from error
        self._know(file.path, sha256, file.status)
        if not file.has_changed:
            remember(file.path, self._notes, file.status, sha256, xxh3)

    def _know(self, path: pathlib.Path, sha256: str, status: os.stat_result) -> None:
        self._known[path], self._marks[path] = sha256, _mark(status)


def _mark(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns  # some network mounts give another inode at each look
