"""CSV and TSV, as spreadsheets and programs write them: whatever parts the columns, whatever ends the lines."""

from __future__ import annotations

import csv
import io
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nybble.data.readers.row import Item, Notice, Row
from nybble.data.readers.text import START, beginning, checked, kind_of, lines
from nybble.errors import DataError

LOOKED_AT = 100  # lines by which a delimiter is told
EMPTY_COLUMNS = "empty columns at the end are ignored"
EMPTY_ROWS = "empty rows are ignored"
MAX_CSV_FIELD = 1 << 28  # csv's own default of 128 KiB is less than one long document
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAID = re.compile(r'"?sep=(\\t|[^\w\s"]|\t)"?[,;\t|]*', re.IGNORECASE)
"""Excel's own first line, which names the delimiter and is no row."""


@dataclass(frozen=True)
class Dialect:
    """How a table is written."""

    delimiter: str
    spaced: bool
    """A space follows each delimiter and belongs to no field."""
    skipped: int
    """Lines above the header."""


def read_csv(file: pathlib.Path) -> Iterator[Item]:
    """Rows and faults of a table, and a notice where empty columns or rows of it are ignored.

    Raises:
        DataError: the header names a column twice, or a quote is not closed.
    """
    told: set[Notice] = set()
    for item in _items(file):
        if not isinstance(item, Notice):
            yield item
        elif item not in told:
            told.add(item)
            yield item


def _items(file: pathlib.Path) -> Iterator[Item]:
    csv.field_size_limit(MAX_CSV_FIELD)
    dialect = _dialect(file)
    text = (checked(line, file, number) for number, line in lines(file, ""))
    reader = csv.reader(
        itertools.islice(text, dialect.skipped, None),
        delimiter=dialect.delimiter,
        skipinitialspace=dialect.spaced,
        strict=True,
    )
    first = dialect.skipped + 1  # line of a record; quoted fields may hold line breaks
    try:
        header = next(filter(_is_filled, reader), [])
        names = _named(header, f"{file}:{dialect.skipped + reader.line_num}")
        if len(names) < len(header):
            yield Notice(f"{file.name}: {EMPTY_COLUMNS}")
        first = dialect.skipped + reader.line_num + 1
        for fields in reader:
            origin = f"{file}:{first}"
            first = dialect.skipped + reader.line_num + 1
            if len(fields) == len(names) and fields[0] and not fields[0].isspace():  # nearly every row
                yield Row(dict(zip(names, fields, strict=True)), origin)
            elif not _is_filled(fields):
                if fields:  # a blank line has none
                    yield Notice(f"{file.name}: {EMPTY_ROWS}")
            elif len(fields) < len(names) or _is_filled(fields[len(names) :]):
                yield _uneven(fields, names, dialect, origin)
            else:
                if len(fields) > len(names):
                    yield Notice(f"{file.name}: {EMPTY_COLUMNS}")
                yield Row(dict(zip(names, fields, strict=False)), origin)
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}", where=f"{file}:{first}", fix="close every quote, and double those inside"
        ) from error


def _is_filled(fields: list[str]) -> bool:
    return any(map(str.strip, fields))


def _named(header: list[str], where: str) -> list[str]:
    """The header without the unnamed columns at its end."""
    width = len(header)
    while width and not header[width - 1].strip():
        width -= 1
    counts = Counter(name for name in header[:width] if name.strip())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"two columns of the header have the same name: {twice[0]!r}",
            where=where,
            fix="give each column a different name",
        )
    return header[:width]


def _uneven(fields: list[str], names: list[str], dialect: Dialect, origin: str) -> DataError:
    delimiters = DELIMITERS.get(dialect.delimiter, repr(dialect.delimiter))
    return DataError(
        f"{len(fields)} field{'s' * (len(fields) != 1)}, but the header has {len(names)} ({', '.join(names)})",
        where=origin,
        fix=f"quote fields that contain {delimiters} or line breaks",
    )


def _dialect(file: pathlib.Path) -> Dialect:
    """How a table is written, by its beginning."""
    start = beginning(file)
    sample = list(io.StringIO(start.decode("utf-8-sig", "replace"), newline=""))
    if len(start) == START and len(sample) > 1:
        del sample[-1]  # cut in the middle
    order = list(DELIMITERS)
    if kind_of(file) == ".tsv":
        order.sort(key="\t".__ne__)
    said = SAID.fullmatch(sample[0].strip("\r\n")) if sample else None
    if said is not None:
        delimiter = "\t" if said[1] == "\\t" else said[1]
    else:
        delimiter = max(order, key=lambda delimiter: _fitting(sample, delimiter))  # of equals the first
    skipped = int(said is not None)
    header, *_ = _records(sample[skipped:], delimiter) or [[]]
    spaced = delimiter != "\t" and len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return Dialect(delimiter, spaced, skipped)


def _fitting(sample: list[str], delimiter: str) -> int:
    """How many records have the header's number of fields; none where the delimiter does not part the header."""
    records = _records(sample, delimiter)
    return sum(len(record) == len(records[0]) for record in records) if records and len(records[0]) > 1 else 0


def _records(sample: list[str], delimiter: str) -> list[list[str]]:
    records = []
    try:
        for record in csv.reader(sample[:LOOKED_AT], delimiter=delimiter, strict=True):
            records += [record] if _is_filled(record) else []
    except csv.Error:  # another delimiter is meant, or the sample ends within quotes
        pass
    return records
