"""Files to rows, each with its `file:line`.

A reader yields rows, and in place of a line it cannot read the fault; it raises where the rest of the file is lost too.
No reader holds more of a file than a chunk or a row.
"""

from nybble.data.rows.readers.files import (
    JSON_KINDS,
    KINDS,
    opened,
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
    "opened",
    "read_file",
    "read_rows_of",
    "read_text_file",
    "refuse_special",
    "unreadable",
]
