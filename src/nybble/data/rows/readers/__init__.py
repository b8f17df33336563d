"""Files to rows, each with its `file:line`.

A reader yields rows, and in place of a line it cannot read the fault; it raises where the rest of the file is lost too.
No reader holds more of a file than a chunk or a row.
"""

from nybble.data.rows.readers.files import JSON_KINDS, KINDS, read_file, refuse_special, refuse_stranger
from nybble.data.rows.readers.lines import document, kind_of
from nybble.data.rows.readers.row import MAX_ROW, MB, Item, Notice, Row, TooLargeError, Unreadable, listing

__all__ = [
    "JSON_KINDS",
    "KINDS",
    "MAX_ROW",
    "MB",
    "Item",
    "Notice",
    "Row",
    "TooLargeError",
    "Unreadable",
    "document",
    "kind_of",
    "listing",
    "read_file",
    "refuse_special",
    "refuse_stranger",
]
