"""CSV and TSV."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterator

from nybble.data.readers.row import Item, Row
from nybble.data.readers.text import kind_of, lines
from nybble.errors import DataError

MAX_CSV_FIELD = 1 << 28  # csv's own default of 128 KiB is less than one long document


def read_csv(file: pathlib.Path) -> Iterator[Item]:
    csv.field_size_limit(MAX_CSV_FIELD)
    header = next(lines(file), "")
    semicolons = ";" in header and "," not in header and "\t" not in header  # as Excel writes it in much of Europe
    delimiter = "\t" if kind_of(file) == ".tsv" else ";" if semicolons else ","
    reader = csv.reader(lines(file), delimiter=delimiter, strict=True)
    first = 1  # line of a record; quoted fields may hold line breaks
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError("two columns of the header have the same name", where=f"{file}:1")
        first = reader.line_num + 1
        for fields in reader:
            origin = f"{file}:{first}"
            first = reader.line_num + 1
            if len(fields) == len(names):
                yield Row(dict(zip(names, fields, strict=True)), origin)
            elif fields:  # a blank line has none
                yield DataError(
                    f"the row has not as many fields as the header ({', '.join(names)})",
                    where=origin,
                    fix="quote fields that contain commas or line breaks",
                )
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}", where=f"{file}:{first}", fix="close every quote, and double those inside"
        ) from error
