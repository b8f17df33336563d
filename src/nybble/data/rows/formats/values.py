"""The text of a cell, and what else cells hold: numbers, parts of a message, lists written as text."""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nybble.data.rows.formats.conversation import EmptyAnswerError, Rules, ShownError
from nybble.errors import DataError

INVISIBLE = frozenset({"Cc", "Cf", "Cn", "Cs"})  # control and format characters, zero-width ones among them
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
"""Letters and marks that look like nothing: Hangul fillers, a Braille cell without dots, variation selectors."""
STRING = re.compile(r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)""")
ESCAPES = ("\\\\", "\\'", '\\"')
LONGEST_LITERAL = 200_000  # characters outside of strings: Python's parser takes hundreds of bytes for each
NUMBERS = "numbers and true or false are read as their text"
PARTS = "content in text parts is joined"
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
TOOLS = frozenset({"tool", "tool_call", "tool_calls", "tool_response", "tool_responses", "tool_result", "tool_use",
                   "function", "function_call", "function_response", "observation", "ipython"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowContext:
    """The row that values are from, and what the user should know of how it was read."""

    origin: str
    notes: set[str] = field(default_factory=set)
    rules: Rules = Rules.NOW


def string(value: Any, column: str, context: RowContext) -> str:
    """The text of a value; null is none.

    Raises:
        DataError: it has no text, or holds what is no character.
    """
    if value is None:
        return ""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        context.notes.add(NUMBERS)
        return json.dumps(value)
    if not isinstance(value, str):
        kind = "NaN" if value != value else type(value).__name__
        raise ShownError(f"{column!r} must be text, found {kind}", value, where=context.origin)
    if "\0" in value:
        raise DataError(f"{column!r} contains a null character", where=context.origin, fix="delete it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{column!r} contains half a surrogate pair, which is not a character", where=context.origin)
    return value


def filled(value: Any, column: str, context: RowContext) -> str:
    """Text that is not empty.

    Raises:
        DataError: it is, or is not text.
    """
    text = string(value, column, context)
    if not _says_something(text, context):
        raise DataError(f"an empty {column!r}", where=context.origin, fix="delete the row or fill it in")
    return text


def answer_of(value: Any, column: str, context: RowContext) -> str:
    """An answer's text.

    Raises:
        DataError: it is empty, or not text.
    """
    answer = string(value, column, context)
    if not _says_something(answer, context):
        raise EmptyAnswerError(
            f"a row without an answer: {column!r} is empty", where=context.origin, fix="delete the row or fill it in"
        )
    return answer


def _says_something(text: str, context: RowContext) -> bool:
    """Whether any character of a text can be seen; in earlier versions, whether any is not white space."""
    if context.rules < Rules.NOW:
        return bool(text.strip())
    return any(
        not character.isspace() and unicodedata.category(character) not in INVISIBLE and character not in BLANK
        for character in text
    )


def joined(value: Any, column: str, context: RowContext) -> Any:
    """A message's content: of a list of text parts, as OpenAI writes them, the text; anything else as it is.

    Raises:
        DataError: a part is something other than text.
    """
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise (
                no_tools(f"{column!r} has a part of type {kind}", context)
                if kind in TOOLS
                else _text_only(f"{column!r} has a part of type {kind}", context)
            )
        if kind is None or not isinstance(part.get("text"), str):
            return value
    context.notes.add(PARTS)
    return "".join(part["text"] for part in value)


def refuse_media(values: Mapping[str, Any], what: str, context: RowContext) -> None:
    """Refuse a row or turn that comes with pictures or sound: its text makes little sense without them.

    Raises:
        DataError: it does.
    """
    for name in MEDIA & values.keys():
        if values[name] and context.rules > Rules.V0_5:
            raise _text_only(f"{what} has {name!r}", context)


def literal(text: str) -> Any:
    """The list or object that a text stands for, as JSON or as Python prints it; None where it stands for neither."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if _outside_strings(text) > LONGEST_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            # Of a backslash that begins no escape: a DeprecationWarning before Python 3.12, a SyntaxWarning since.
            for kind in (SyntaxWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _outside_strings(text: str) -> int:
    """How many characters of Python's text stand outside of its strings."""
    for escape in ESCAPES:
        text = text.replace(escape, "")
    return len(STRING.sub("", text))


def no_tools(what: str, context: RowContext) -> DataError:
    """The fault of a call of a tool."""
    return DataError(
        f"{what}: nybble does not train tool calls",
        where=context.origin,
        fix="remove these rows, or write the calls as text",
    )


def _text_only(what: str, context: RowContext) -> DataError:
    return DataError(
        f"{what}: nybble trains on text only",
        where=context.origin,
        fix="remove these rows, or only that part where the text makes sense without it",
    )
