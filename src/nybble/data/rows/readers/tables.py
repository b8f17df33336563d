"""Reads CSV and TSV as spreadsheets and programs write them, with any of the usual delimiters and line ends."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nybble.data.rows.readers.kinds import kind_of
from nybble.data.rows.readers.lines import START, beginning, checked, lines
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.row import MB, Item, Notice, Row, listing, too_large
from nybble.errors import DataError

SAMPLE_LINES = 100  # lines from which the delimiter is detected
EMPTY_COLUMNS = "empty columns at the end are ignored"
EMPTY_ROWS = "empty rows are ignored"
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEP_LINE = re.compile(r'"?sep=(\\t|[^\w\s"]|\t)"?[,;\t|]*', re.IGNORECASE)
"""A first line written by Excel, which names the delimiter and is not a row."""


@dataclass(frozen=True)
class Dialect:
    """How a table is written."""

    delimiter: str
    spaced: bool
    """Whether a space, which does not belong to a field, follows each delimiter."""
    skipped: int
    """The number of lines above the header."""


class Record:
    """Supplies the csv module with lines, and keeps track of the lines of the current record: a quoted field may span several.

    Args:
        file: the table, perhaps gzipped.
        limit: characters that a record may have.
        dialect: of the table.
    """

    def __init__(self, file: OpenFile, limit: int, dialect: Dialect) -> None:
        self.file = file
        self.limit = limit
        self.dialect = dialect
        self.unread = itertools.islice(lines(file, "", limit), dialect.skipped, None)
        self.first = self.line = dialect.skipped + 1
        """The line on which the record begins, and the line to read next; they differ if quoted fields contain line breaks."""
        self.size = 0
        self.newest = ""
        """The line that was read last."""
        self.opened: int | None = None
        """The line with the opening quote of a field that is still open before the newest line; None if there is none."""

    def __iter__(self) -> Iterator[str]:
        for number, line in self.unread:
            text = checked(line, self.file, number)
            if self.size:
                self.opened = self._left_open()
            self.newest, self.line, self.size = text, number + 1, self.size + len(text)
            if self.size > self.limit:
                raise csv.Error("the record is too long")
            yield text

    def end(self) -> str:
        """End the record; returns where it began."""
        origin = f"{self.file}:{self.first}"
        self.first, self.size, self.opened = self.line, 0, None
        return origin

    def fault(self, error: csv.Error) -> DataError:
        """The fault for an error of csv; if a quote is not closed, it is reported where that opens."""
        opened = self._left_open()
        where = f"{self.file}:{self.first if opened is None else opened}"
        fix = "close every quote, and double those inside"
        is_long = self.size > self.limit
        if is_long and opened is None:
            return too_large("a record", self.limit, where)
        if is_long:
            what = f"the quotes that open here are not closed within {self.limit / MB:,.0f} MB"
            fix += f"; if a field is meant to be this large, allow it with data.max_row_mb={2 * self.limit // MB}"
        else:
            what = str(error) + ("" if opened is None else " within the quotes that open here")
        return DataError(f"not valid CSV: {what}", where=where, fix=fix)

    def _left_open(self) -> int | None:
        """The line with the opening quote of a field that is still open after the newest line; None if there is none."""
        text, delimiter, position = self.newest, self.dialect.delimiter, 0
        is_quoted = self.opened is not None
        opened = self.opened
        while is_quoted or position < len(text):
            position += self.dialect.spaced and text[position : position + 1] == " "
            if not is_quoted and text[position : position + 1] == '"':
                is_quoted, opened, position = True, self.line - 1, position + 1
            if is_quoted:
                position = _closing(text, position)
                if position == 0:
                    return opened
            is_quoted = False
            position = text.find(delimiter, position) + 1
            if position == 0:
                return None
        return None


def _closing(text: str, position: int) -> int:
    """The position after a quoted field's closing quote; 0 if there is none. Doubled quotes are part of the field."""
    position = text.find('"', position) + 1
    while position and text[position : position + 1] == '"':
        position = text.find('"', position + 1) + 1
    return position


def read_csv(file: OpenFile, limit: int) -> Iterator[Item]:
    """Rows and faults of a table, and a notice if empty columns or rows are ignored.

    Args:
        file: the table, perhaps gzipped.
        limit: characters that a row may have.

    Raises:
        DataError: the header names a column twice, or a quote is not closed.
    """
    notices: set[Notice] = set()
    for item in _items(file, limit):
        if not isinstance(item, Notice):
            yield item
        elif item not in notices:
            notices.add(item)
            yield item


def _items(file: OpenFile, limit: int) -> Iterator[Item]:
    csv.field_size_limit(limit)  # csv's default of 128 KiB is less than one long document
    dialect = _dialect(file)
    record = Record(file, limit, dialect)
    reader = csv.reader(iter(record), delimiter=dialect.delimiter, skipinitialspace=dialect.spaced, strict=True)
    try:
        header: list[str] = []
        while not header and (fields := next(reader, None)) is not None:
            if _is_filled(fields):
                header = fields
            else:
                record.end()
        names = _column_names(header, f"{file}:{dialect.skipped + reader.line_num}")
        if len(names) < len(header):
            yield Notice(f"{file.path.name}: {EMPTY_COLUMNS}")
        record.end()
        for fields in reader:
            origin = record.end()
            if len(fields) == len(names) and fields[0] and not fields[0].isspace():  # nearly every row
                yield Row(dict(zip(names, fields, strict=True)), origin)
            elif not _is_filled(fields):
                if fields:  # a blank line has none
                    yield Notice(f"{file.path.name}: {EMPTY_ROWS}")
            elif len(fields) < len(names) or _is_filled(fields[len(names) :]):
                yield _field_count_fault(fields, names, dialect, origin)
            else:
                if len(fields) > len(names):
                    yield Notice(f"{file.path.name}: {EMPTY_COLUMNS}")
                yield Row(dict(zip(names, fields, strict=False)), origin)
    except csv.Error as error:
        raise record.fault(error) from error


def _is_filled(fields: list[str]) -> bool:
    return any(map(str.strip, fields))


def _column_names(header: list[str], where: str) -> list[str]:
    """The names in the header, without the unnamed columns at its end."""
    width = len(header)
    while width and not header[width - 1].strip():
        width -= 1
    counts = Counter(name for name in header[:width] if name.strip())
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"two columns of the header have the same name: {repeated[0]!r:.60}",
            where=where,
            fix="give each column a different name",
        )
    return header[:width]


def _field_count_fault(fields: list[str], names: list[str], dialect: Dialect, origin: str) -> DataError:
    delimiters = DELIMITERS.get(dialect.delimiter, repr(dialect.delimiter))
    return DataError(
        f"{len(fields)} field{'s' * (len(fields) != 1)}, but the header has {len(names)} ({listing(names)})",
        where=origin,
        fix=f"quote fields that contain {delimiters} or line breaks",
    )


def _dialect(file: OpenFile) -> Dialect:
    """The dialect of a table, detected from its beginning."""
    start = beginning(file)
    sample = list(io.StringIO(start.decode("utf-8-sig", "replace"), newline=""))
    if len(start) == START and len(sample) > 1:
        del sample[-1]  # it is cut off in the middle
    order = list(DELIMITERS)
    if kind_of(file.path) == ".tsv":
        order.sort(key="\t".__ne__)
    named = SEP_LINE.fullmatch(sample[0].strip("\r\n")) if sample else None
    if named is not None:
        delimiter = "\t" if named[1] == "\\t" else named[1]
    else:
        delimiter = max(order, key=lambda delimiter: _matching_records(sample, delimiter))  # the first of equals
    skipped = int(named is not None)
    header, *_ = _records(sample[skipped:], delimiter) or [[]]
    spaced = delimiter != "\t" and len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return Dialect(delimiter, spaced, skipped)


def _matching_records(sample: list[str], delimiter: str) -> int:
    """How many records have as many fields as the header; 0 if the header has only one."""
    records = _records(sample, delimiter)
    return sum(len(record) == len(records[0]) for record in records) if records and len(records[0]) > 1 else 0


def _records(sample: list[str], delimiter: str) -> list[list[str]]:
    records = []
    try:
        for record in csv.reader(sample[:SAMPLE_LINES], delimiter=delimiter, strict=True):
            records += [record] if _is_filled(record) else []
    except csv.Error:  # another delimiter is meant, or the sample ends within quotes
        pass
    return records
