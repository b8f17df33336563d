"""Rows of every form to conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nybble.data.sources import Row
from nybble.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str
    input: str = ""
    """Alpaca's second field, which its template sets apart from the instruction; other templates append it."""


Conversation = tuple[Message, ...]

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # form: (required fields, optional fields)
    "alpaca": (("instruction", "output"), ("input", "system")),
    "messages": (("messages",), ()),
    "prompt": (("prompt", "completion"), ("system",)),
}


@dataclass(frozen=True)
class Form:
    """A form of rows, with the column each of its fields is read from."""

    name: str
    columns: Mapping[str, str]

    def conversation(self, row: Row) -> Conversation:
        """The row as turns.

        Raises:
            DataError: what is wrong with the row, at its `file:line`.
        """
        values = {field: row.values.get(column) for field, column in self.columns.items()}
        for field in FIELDS[self.name][0]:
            if self.columns[field] not in row.values:
                raise _missing(self, row)
        if self.name == "messages":
            return tuple(_turns(values["messages"], row.origin))
        if self.name == "alpaca":
            question, answer = "instruction", "output"
        else:
            question, answer = "prompt", "completion"
        system = _string(values.get("system"), self.columns["system"], row.origin)
        user = Message(
            "user",
            _string(values[question], self.columns[question], row.origin),
            input=_string(values.get("input"), self.columns.get("input", ""), row.origin),
        )
        if not user.content.strip():
            raise DataError(f"an empty {self.columns[question]!r}", where=row.origin)
        reply = Message("assistant", _answer(values[answer], self.columns[answer], row.origin))
        return (*([Message("system", system)] if system.strip() else []), user, reply)


def detect_form(rows: Iterable[Row], form: str, mapping: Mapping[str, str], sample: int = 100) -> Form:
    """Find the form of rows from their columns.

    Args:
        rows: the first `sample` of them are looked at.
        form: a form's name, or auto.
        mapping: column of a field, where it carries another name.

    Raises:
        DataError: no form fits; says what was found and what is expected.
    """
    head = list(itertools.islice(rows, sample))
    if not head:
        raise DataError("there are no rows")
    names = list(FIELDS) if form == "auto" else [form]
    unknown = [field for field in mapping if not any(field in sum(FIELDS[name], ()) for name in names)]
    if unknown:
        expected = sorted({field for name in names for field in sum(FIELDS[name], ())})
        raise DataError(
            f"data.map names no field of nybble's: {', '.join(unknown)}",
            fix=f"the fields are {', '.join(expected)}; write data.map={{field: your column}}",
        )
    forms = [Form(name, {field: mapping.get(field, field) for field in sum(FIELDS[name], ())}) for name in names]
    fitting = [(sum(_fits(form, row, mapping) for row in head), form) for form in forms]
    count, best = max(fitting, key=lambda pair: pair[0])
    if count == 0:
        raise _missing(best if len(forms) == 1 else None, head[0])
    return best


def _fits(form: Form, row: Row, mapping: Mapping[str, str]) -> bool:
    return all(field in form.columns for field in mapping) and all(
        form.columns[field] in row.values for field in FIELDS[form.name][0]
    )


def _missing(form: Form | None, row: Row) -> DataError:
    if form is not None:
        expected = ", ".join(form.columns[field] for field in FIELDS[form.name][0]) + f" ({form.name})"
    else:
        expected = ", or ".join(f"{', '.join(required)} ({name})" for name, (required, _) in FIELDS.items())
    return DataError(
        f"unknown fields: found {', '.join(map(repr, row.values))}; expected {expected}",
        where=row.origin,
        fix="name the columns, e.g. 'data.map={prompt: question, completion: answer}'",
    )


def _string(value: Any, column: str, origin: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{column!r} must be text, found {type(value).__name__}: {value!r:.60}", where=origin)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{column!r} holds half a surrogate pair, which is no character", where=origin)
    return value


def _answer(value: Any, column: str, origin: str) -> str:
    answer = _string(value, column, origin)
    if not answer.strip():
        raise DataError(
            f"a row without an answer: {column!r} is empty", where=origin, fix="delete the row or fill it in"
        )
    return answer


def _turns(value: Any, origin: str) -> Iterator[Message]:
    """Turns that alternate user and assistant after at most one system message, and end with an answer."""
    if not isinstance(value, list) or not value:
        raise DataError("'messages' must be a list of {role, content}", where=origin)
    expected: Role = "user"
    for position, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f"message {position + 1} must have role and content, found {turn!r:.80}", where=origin)
        role = turn["role"]
        if role not in ROLES:
            raise DataError(f"message {position + 1}: role {role!r} is not one of {', '.join(ROLES)}", where=origin)
        if role == "system" and position == 0:
            yield Message("system", _string(turn["content"], "content", origin))
            continue
        if role != expected:
            raise DataError(
                f"message {position + 1} is from {role}, expected {expected}: turns alternate", where=origin
            )
        if role == "assistant":
            yield Message("assistant", _answer(turn["content"], "content", origin))
        else:
            yield Message("user", _string(turn["content"], "content", origin))
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant" or len(value) == 1:
        raise DataError("a row without an answer: the conversation ends before the assistant speaks", where=origin)
