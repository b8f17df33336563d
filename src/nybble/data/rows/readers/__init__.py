"""From files to rows, each with its `file:line`.

A reader yields rows, and in place of a row that it cannot read, its fault; it raises a fault if the rest of the file cannot be
read either. No reader has more of a file in memory than a chunk or a row.
"""

from nybble.data.rows.readers.files import (
    JSON_KINDS,
    KINDS,
    open_data_file,
    read_file,
    read_rows_of,
    read_text_file,
    refuse_special,
    unreadable,
)
from nybble.data.rows.readers.kinds import kind_of
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.row import MAX_ROW, MB, Item, Notice, Row, TooLargeError, Unreadable, listing

__all__ = [
    "JSON_KINDS",
    "KINDS",
    "MAX_ROW",
    "MB",
    "Item",
    "Notice",
    "OpenFile",
    "Row",
    "TooLargeError",
    "Unreadable",
    "kind_of",
    "listing",
    "open_data_file",
    "read_file",
    "read_rows_of",
    "read_text_file",
    "refuse_special",
    "unreadable",
]
