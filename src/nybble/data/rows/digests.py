"""SHA-256 of data files: remembered from an earlier run, or taken of the bytes while their rows are read."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

from nybble.data.rows.readers import OpenFile, refuse_special, unreadable
from nybble.errors import DataError
from nybble.files.remembered import is_unchanged, recall, remember


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
        if file.path not in self._known and earlier is not None and is_unchanged(earlier, file.status):
            self._known[file.path] = earlier["sha256"]
        elif file.path not in self._known:
            file.hash_as_read()

    def _end(self, file: OpenFile) -> None:
        if file.path not in self._known:
            self._hash(file)
        elif file.has_changed:
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
            earlier = self._earlier[path]
            if earlier is not None and is_unchanged(earlier, path.stat()):
                self._known[path] = earlier["sha256"]
                return
            with OpenFile(path) as file:
                self._hash(file)
        except OSError as error:
            raise unreadable(path, error) from error

    def _hash(self, file: OpenFile) -> None:
        try:
            sha256, xxh3 = file.digests()
            if not file.has_changed:
                remember(file.path, self._notes, file.status, sha256, xxh3)
        except OSError as error:
            raise unreadable(file.path, error) from error
        self._known[file.path] = sha256
