"""What all records of a run have in common: frozen typed fields, a format version, and how they are read and written.

A record keeps its keys from version to version. A record without a version number has version 1: nybble up to 0.7.0 wrote none.
Fields that an older version did not write have defaults, and keys that this version does not know are ignored.
"""

from __future__ import annotations

import datetime
import pathlib
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, PlainValidator
from pydantic_core import PydanticCustomError

from nybble.errors import RunError
from nybble.files.reading import RESTORE, Shape, as_shape, read_object
from nybble.files.writing import write_json


def _text(value: object) -> str:
    """Any text: pydantic's own type refuses a file name that is not UTF-8, which Python reads as half of a surrogate pair."""
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return value


def _moment(value: object) -> str:
    text = _text(value)
    datetime.datetime.fromisoformat(text)
    return text


def _day(value: object) -> datetime.date:
    return datetime.date.fromisoformat(_text(value))


def _compute_type(value: object) -> str:
    if value not in ("bfloat16", "float16", "float32"):
        raise PydanticCustomError("literal_error", "Input should be 'bfloat16', 'float16' or 'float32'")
    return _text(value)


AnyText = Annotated[str, PlainValidator(_text)]
ComputeType = Annotated[str, PlainValidator(_compute_type)]
Moment = Annotated[str, PlainValidator(_moment)]
"""A date with its time, by ISO 8601."""
Day = Annotated[datetime.date, PlainValidator(_day)]
"""A date, by ISO 8601."""


class FrozenShape(Shape):
    """Fields that belong together in a record; they cannot be changed."""

    model_config = ConfigDict(frozen=True)

    def as_json(self) -> dict[str, Any]:
        """The keys for the file: those that were set, even if the value is the default."""
        return self.model_dump(exclude_unset=True)


class RunRecord(FrozenShape):
    """A JSON file of a run."""

    VERSION: ClassVar[int] = 1
    """The format version that this program writes, and the newest that it reads."""

    version: int = 1
    """The format version of the file."""


R = TypeVar("R", bound=RunRecord)


class FileEntry(FrozenShape):
    """Size and digest of a file when it was written."""

    size: int
    digest: AnyText


def read_record(file: pathlib.Path, record: type[R], fix: str = RESTORE) -> R:
    """A record from its file.

    Args:
        file: the file.
        record: the record's class.
        fix: what to do if the file is damaged.

    Raises:
        RunError: it is missing or damaged, or a newer nybble wrote it.
    """
    return as_shape(read_versioned(file, record, fix), file, record, RunError, fix)


def read_versioned(file: pathlib.Path, record: type[RunRecord], fix: str = RESTORE) -> dict[str, Any]:
    """The object in a record's file; only its version is checked.

    Raises:
        RunError: it is missing or not an object, or a newer nybble wrote it.
    """
    stored = read_object(file, RunError, fix)
    version = stored.get("version", 1)
    if type(version) is int and version > record.VERSION:
        supported = f"this nybble reads up to version {record.VERSION}"
        raise RunError(
            f"a newer nybble wrote {file.name}: its format is version {version}, and {supported}",
            where=str(file),
            fix="pip install -U nybble",
        )
    return stored


def write_record(file: pathlib.Path, record: RunRecord) -> None:
    """Write a record with the version of its format, atomically."""
    fields = record.model_dump(exclude_unset=True, exclude={"version"})
    write_json(file, {"version": record.VERSION, **fields})
