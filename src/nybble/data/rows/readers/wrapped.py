"""Rows inside one object, as programs write them: named lists, the Hub viewer's rows, SQuAD's articles."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nybble.data.rows.readers.json_text import JsonText
from nybble.data.rows.readers.lines import fed
from nybble.data.rows.readers.open_file import OpenFile
from nybble.data.rows.readers.row import Item, Notice, Row, listing, row_of, too_large
from nybble.errors import DataError

HOLDERS = (
    # names of lists that hold rows; of several the first is read, so that held-out rows are not trained on
    "train", "training", "data", "rows", "examples", "instances", "items", "records", "samples", "entries", "dataset",
    "conversations", "validation", "valid", "dev", "eval", "test",
)  # fmt: skip
COLUMNS = "import pandas; pandas.read_json({0!r}).to_json('NEW.jsonl', orient='records', lines=True)"


@dataclass(frozen=True)
class Member:
    """A member of an object; of a list its first element and its length."""

    name: str
    value: Any
    length: int | None = None

    @property
    def found(self) -> Any:
        """The value; of a list no more than its first element."""
        return self.value if self.length is None else [self.value][: self.length]

    @property
    def holds_objects(self) -> bool:
        """Whether this is a list of objects that are not turns: rows, perhaps."""
        return _may_be_rows(self.found)


@dataclass(frozen=True)
class Outline:
    """A file's first object."""

    members: tuple[Member, ...]
    lines: int
    """How many it takes."""
    is_alone: bool
    """Nothing follows it."""

    @property
    def holders(self) -> list[str]:
        """The lists that hold rows, the one to read first."""
        found = {member.name.lower(): member.name for member in self.members if member.holds_objects}
        return [found[name] for name in HOLDERS if name in found] if self.is_alone else []

    def refuse_unread(self, file: OpenFile) -> None:
        """Refuse an object that is no row on a line of its own.

        Raises:
            DataError: it is spread over several lines, or holds columns.
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
                fix=one_a_line(file.path),
            )
        if self.lines > 1:
            inside = rows_inside({member.name: member.found for member in self.members})
            raise DataError(
                "one object over several lines; rows must be an array of objects or one object per line",
                where=f"{file}:1",
                fix=f"if it is one row: {one_a_line(file.path)}"
                if inside is None
                else f"if the rows are in {inside}: {one_a_line(file.path, f'{inside}[]')}",
            )

    def _are_columns(self) -> bool:
        """Whether this is how pandas writes a table by default: columns, each with its rows by number."""
        columns = [member.value for member in self.members]
        return bool(columns) and all(isinstance(column, dict) and "0" in column for column in columns)


def one_a_line(path: pathlib.Path, rows: str = ".") -> str:
    """The command that writes rows of a JSON file, which jq finds so, each on a line of its own."""
    return fed(f"jq -c {shlex.quote(rows)}", path) + " > NEW.jsonl"


def rows_inside(values: dict[str, Any]) -> str | None:
    """The path in an object of a list that may be rows, as jq writes it: ."data"."train"; None where there is none."""
    lists = {f".{json.dumps(name, ensure_ascii=not name.isprintable())}": value for name, value in values.items()}
    inner = {
        f"{path}.{json.dumps(name)}": within
        for path, value in lists.items()
        if isinstance(value, dict)
        for name, within in value.items()
        if name.lower() in HOLDERS
    }
    return next((path for path, value in {**lists, **inner}.items() if _may_be_rows(value)), None)


def outline_of(file: OpenFile, limit: int) -> Outline:
    """What a file's first object consists of, without holding it.

    Raises:
        DataError: it is not JSON, or what it holds besides lists is over the limit.
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
    """Rows of the first of the lists that hold some, and a notice of which was read.

    Raises:
        DataError: the rest of the file cannot be read.
    """
    chosen, *others = outline.holders
    left = f", not from {' or '.join(map(repr, others))}" if others else ""
    yield Notice(f"{file.path.name}: rows are read from {chosen!r}{left}")
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
            yield _shown(value, origin)
        elif isinstance(value, dict) and isinstance(value.get("paragraphs"), list):
            yield Notice(
                f"{file.path.name}: SQuAD's question, context and first answer are read as instruction, input, output"
            )
            yield from _questions(value, origin)
        else:
            yield row_of(value, origin)
    except DataError as fault:
        yield fault


def _shown(value: dict[str, Any], origin: str) -> Row:
    """A row as the Hub's viewer gives it."""
    if cut := value.get("truncated_cells"):
        raise DataError(
            f"the Hub's viewer has truncated {listing(cut) if isinstance(cut, list) else 'cells'}",
            where=origin,
            fix="read the whole data set from the Hub: nybble train MODEL owner/name",
        )
    return Row(value["row"], origin)


def _questions(article: dict[str, Any], origin: str) -> Iterator[Row]:
    """The questions of one of SQuAD's articles."""
    number = 0
    try:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                number += 1
                answers = asked.get("answers") or [{"text": None}]
                values = {"instruction": asked["question"], "input": paragraph["context"], "output": answers[0]["text"]}
                yield Row(values, f"{origin}, question {number}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an article of SQuAD's form: {error!r}", where=origin) from error
