"""The text of a cell."""

from __future__ import annotations

from typing import Any

from nybble.data.formats.conversation import EmptyAnswerError
from nybble.errors import DataError


def string(value: Any, column: str, origin: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = "NaN" if value != value else type(value).__name__
        raise DataError(f"{column!r} must be text, found {kind}: {value!r:.60}", where=origin)
    if "\0" in value:
        raise DataError(f"{column!r} holds a null character", where=origin, fix="delete it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{column!r} holds half a surrogate pair, which is no character", where=origin)
    return value


def filled(value: Any, column: str, origin: str) -> str:
    text = string(value, column, origin)
    if not text.strip():
        raise DataError(f"an empty {column!r}", where=origin, fix="delete the row or fill it in")
    return text


def answer_of(value: Any, column: str, origin: str) -> str:
    answer = string(value, column, origin)
    if not answer.strip():
        raise EmptyAnswerError(
            f"a row without an answer: {column!r} is empty", where=origin, fix="delete the row or fill it in"
        )
    return answer
