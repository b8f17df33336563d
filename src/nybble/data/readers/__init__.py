"""Files to rows, each with its `file:line`.

A reader yields rows, and in place of a line it cannot read the fault; it raises where the rest of the file is lost too.
No reader holds more of a file than a chunk or a row.
"""

from nybble.data.readers.files import JSON_KINDS, KINDS, read_file, refuse_stranger
from nybble.data.readers.row import Item, Notice, Row
from nybble.data.readers.text import document, kind_of

__all__ = ["JSON_KINDS", "KINDS", "Item", "Notice", "Row", "document", "kind_of", "read_file", "refuse_stranger"]
