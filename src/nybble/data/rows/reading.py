"""A recipe's rows, opened once: their forms are detected from the first ones, and reading continues from there."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import itertools
import pathlib
import sys
import uuid
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any, Self

from nybble.data.rows.digests import FileDigests
from nybble.data.rows.formats import Rules, Target, detect_forms
from nybble.data.rows.readers import MB, Item, Row, Unreadable
from nybble.data.rows.sources import fingerprint, read_rows, row_limit, sources_of
from nybble.errors import DataError
from nybble.recipe import DataOptions

STREAM_HEAD = 10_000  # rows of a stream that are examined before training
FORM_ROWS = 1000  # rows from which forms are detected
BUFFER = 64 * MB  # of memory for those rows; if they are larger, the files are opened a second time
DATES = (datetime.date, datetime.time, datetime.timedelta)
SIZED_TYPES = (str, bytes, int, float, type(None), decimal.Decimal, uuid.UUID, Unreadable, *DATES)


class OpenRows:
    """The rows that a recipe's data section names; the first ones are read to detect their forms.

    Args:
        options: the data section.
        rules: the version's rules by which rows are read.
        notes: folder where the files' digests are remembered; None if no digest is needed.
        target: what the rows are read for.

    Raises:
        DataError: a file is missing or of an unknown kind, a folder or pattern has no files, or data.map fits no form.
    """

    def __init__(
        self,
        options: DataOptions,
        rules: Rules = Rules.NOW,
        notes: pathlib.Path | None = None,
        target: Target = "answers",
    ) -> None:
        self.options = options
        self.rules = rules
        self.sources = sources_of(options)
        files = [file for source in self.sources for file in source.files]
        self._digests = FileDigests(files, notes) if notes is not None else None
        self._unread = self._begin()
        self._buffer: list[Item] | None = []
        """The items taken from `_unread` that `items` has not returned yet; None if they did not fit."""
        forms = detect_forms(self._first_rows(), options.form, options.map, target)
        self.forms = dataclasses.replace(forms, rules=rules)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unread.close()

    def items(self) -> Iterator[Item]:
        """All rows, faults and notices; of a stream, the first 10,000."""
        return itertools.islice(self._items(), STREAM_HEAD if self.options.streaming else None)

    def fingerprint(self, *, is_read: bool) -> str | None:
        """SHA-256 of the content of all sources; None if it can be known only when the rows have been read.

        Args:
            is_read: whether the rows have been read.

        Raises:
            DataError: a file cannot be read.
        """
        assert self._digests is not None, "rows that were opened without a folder for digests"
        digests = self._digests.all() if is_read else self._digests.before_reading()
        return None if digests is None else fingerprint(self.sources, digests)

    def _begin(self) -> Generator[Item, None, None]:
        return read_rows(self.sources, row_limit(self.options, self.rules), self._digests)

    def _items(self) -> Iterator[Item]:
        buffered, self._buffer = self._buffer, None
        if buffered is None:
            self._unread.close()
            self._unread = self._begin()
        # A chain, because `yield from` would close the files when the consumer of these items stops early.
        return itertools.chain(buffered or (), self._unread)

    def _first_rows(self) -> Iterator[Row]:
        rows = size = 0
        while rows < FORM_ROWS and (item := next(self._unread, None)) is not None:
            if self._buffer is not None:
                # Cause and traceback keep the whole line in memory: 6,000 of 40 KB took 480 MB.
                if isinstance(item, DataError):
                    item.__traceback__ = item.__cause__ = item.__context__ = None
                size += _size(item)
                self._buffer.append(item)
                if size > BUFFER:
                    self._buffer = None
            if isinstance(item, Row):
                rows += 1
                yield item


def _size(item: Item) -> int:
    """The approximate bytes of memory that an item takes."""
    total, waiting = 1000, [item.values] if isinstance(item, Row) else []
    while waiting:
        value: Any = waiting.pop()
        is_known = isinstance(value, (*SIZED_TYPES, dict, list, tuple))
        total += sys.getsizeof(value) if is_known else MB  # perhaps an image
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
    return total
