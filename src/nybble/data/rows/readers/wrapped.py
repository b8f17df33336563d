"""Reads rows inside one object, as programs write them: named lists, the Hub viewer's rows, SQuAD's articles."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.rows.readers.json_text import JsonText
from nybble.data.rows.readers.lines import command_on
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.row import Item, Notice, Row, listing, row_of, too_large
from nybble.errors import DataError

ROW_LISTS = (
    # names of lists of rows; if there are several, the first is read, so that held-out rows are not trained on
    "train", "training", "data", "rows", "examples", "instances", "items", "records", "samples", "entries", "dataset",
    "conversations", "validation", "valid", "dev", "eval", "test",
)  # fmt: skip
COLUMNS = "import pandas; pandas.read_json({0!r}).to_json('NEW.jsonl', orient='records', lines=True)"


@dataclass(frozen=True)
class Member:
    """A member of an object."""

    name: str
    value: Any
    """Its value; if that is a list, the list's first element."""
    length: int | None = None
    """The length of a list; None for other values."""

    @property
    def preview(self) -> Any:
        """The value; a list is cut after its first element."""
        return self.value if self.length is None else [self.value][: self.length]

    @property
    def holds_objects(self) -> bool:
        """Whether this is a list of objects that are not turns, and so perhaps of rows."""
        return _may_be_rows(self.preview)


@dataclass(frozen=True)
class Outline:
    """The outline of a file's first object."""

    members: tuple[Member, ...]
    lines: int
    """The number of lines that it spans."""
    is_alone: bool
    """Whether nothing follows it."""

    @property
    def row_lists(self) -> list[str]:
        """The names of the lists of rows; the first of them is the one to read."""
        names = {member.name.lower(): member.name for member in self.members if member.holds_objects}
        return [names[name] for name in ROW_LISTS if name in names] if self.is_alone else []

    def refuse_unread(self, file: OpenFile) -> None:
        """Refuse an object that is not a row on its own line.

        Raises:
            DataError: it spans several lines, or contains columns.
        """
        if self.is_alone and self._are_columns():
            raise DataError(
                f"the file contains columns ({listing(member.name for member in self.members)}), not rows",
                where=f"{file}:1",
                fix=f"python -c {shlex.quote(COLUMNS.format(str(file)))}",
            )
        if self.lines > 1 and not self.is_alone:
            raise DataError(
                "objects span several lines; each line must be one object",
                where=f"{file}:1",
                fix=jq_command(file.path),
            )
        if self.lines > 1:
            inside = rows_inside({member.name: member.preview for member in self.members})
            raise DataError(
                "one object over several lines; rows must be an array of objects or one object per line",
                where=f"{file}:1",
                fix=f"if it is one row: {jq_command(file.path)}"
                if inside is None
                else f"if the rows are in {inside}: {jq_command(file.path, f'{inside}[]')}",
            )

    def _are_columns(self) -> bool:
        """Whether this is a table as pandas writes it by default: columns, each with its rows by number."""
        columns = [member.value for member in self.members]
        return bool(columns) and all(isinstance(column, dict) and "0" in column for column in columns)


def jq_command(path: pathlib.Path, rows: str = ".") -> str:
    """The command that writes the rows that a jq expression finds in a JSON file, one per line."""
    return command_on(f"jq -c {shlex.quote(rows)}", path) + " > NEW.jsonl"


def rows_inside(values: dict[str, Any]) -> str | None:
    """The jq path of a list in an object that may be rows, such as ."data"."train"; None if there is none."""
    lists = {f".{json.dumps(name, ensure_ascii=not name.isprintable())}": value for name, value in values.items()}
    inner = {
        f"{path}.{json.dumps(name)}": within
        for path, value in lists.items()
        if isinstance(value, dict)
        for name, within in value.items()
        if name.lower() in ROW_LISTS
    }
    return next((path for path, value in {**lists, **inner}.items() if _may_be_rows(value)), None)


def outline_of(file: OpenFile, limit: int) -> Outline:
    """The outline of a file's first object, found without reading all of it into memory.

    Raises:
        DataError: it is not JSON, or the part of it that is not in lists is over the limit.
    """
    text = JsonText(file, limit)
    text.peek()
    first, members, size = text.line, [], 0
    for name in text.members():
        if size > limit:
            raise too_large("an object", limit, f"{file}:{text.line}")
        if text.peek() == "[":
            value, length = None, 0
            for element, _ in text.elements():
                value, length = element if length == 0 else value, length + 1
                size += text.size if length == 1 else 0
            members.append(Member(name, value, length))
        else:
            members.append(Member(name, text.value()))
            size += text.size
        size += len(name)
    return Outline(tuple(members), text.line - first + 1, not text.peek())


def read_wrapped(file: OpenFile, outline: Outline, limit: int) -> Iterator[Item]:
    """The rows of the first list of rows, and a notice that names it.

    Raises:
        DataError: the rest of the file cannot be read.
    """
    chosen, *others = outline.row_lists
    ignored = f", not from {' or '.join(map(repr, others))}" if others else ""
    yield Notice(f"{file.path.name}: rows are read from {chosen!r}{ignored}")
    text = JsonText(file, limit)
    text.peek()
    for name in text.members():
        if text.peek() != "[":
            text.value()
            continue
        for value, origin in text.elements():
            if name == chosen:
                repeated = text.json.repeated_key()
                yield from (
                    replace(item, repeated=repeated) if isinstance(item, Row) else item
                    for item in _rows(value, origin, file)
                )


def _may_be_rows(value: Any) -> bool:
    """Whether this is a list of objects that are not turns."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not {"role", "from"} & first.keys()


def _rows(value: Any, origin: str, file: OpenFile) -> Iterator[Item]:
    try:
        if isinstance(value, dict) and isinstance(value.get("row"), dict):
            yield _viewer_row(value, origin)
        elif isinstance(value, dict) and isinstance(value.get("paragraphs"), list):
            yield Notice(
                f"{file.path.name}: SQuAD's question, context and first answer are read as instruction, input, output"
            )
            yield from _questions(value, origin)
        else:
            yield row_of(value, origin)
    except DataError as fault:
        yield fault


def _viewer_row(value: dict[str, Any], origin: str) -> Row:
    """The row in an object of the Hub's viewer."""
    if truncated := value.get("truncated_cells"):
        raise DataError(
            f"the Hub's viewer has truncated {listing(truncated) if isinstance(truncated, list) else 'cells'}",
            where=origin,
            fix="read the whole data set from the Hub: nybble train MODEL owner/name",
        )
    return Row(value["row"], origin)


def _questions(article: dict[str, Any], origin: str) -> Iterator[Row]:
    """One row for each question of one of SQuAD's articles."""
    number = 0
    try:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                number += 1
                answers = item.get("answers") or [{"text": None}]
                values = {"instruction": item["question"], "input": paragraph["context"], "output": answers[0]["text"]}
                yield Row(values, f"{origin}, question {number}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an article in SQuAD's format: {error!r}", where=origin) from error
