"""Reads cells as text: strings, numbers, the parts of a message, and lists written as text."""

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

from nybble.data.rows.formats.conversation import BadValueError, EmptyAnswerError, Rules
from nybble.errors import DataError

INVISIBLE = frozenset({"Cc", "Cf", "Cn", "Cs"})  # control and format characters, zero-width ones among them
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
"""Letters and marks that are invisible: Hangul fillers, a Braille cell without dots, variation selectors."""
STRING = re.compile(r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)""")
ESCAPES = ("\\\\", "\\'", '\\"')
LONGEST_LITERAL = 200_000  # characters outside of strings: Python's parser takes hundreds of bytes for each
NUMBERS = "numbers, true and false are read as text"
PARTS = "content in text parts is joined"
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
TOOLS = frozenset({"tool", "tool_call", "tool_calls", "tool_response", "tool_responses", "tool_result", "tool_use",
                   "function", "function_call", "function_response", "observation", "ipython"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowContext:
    """The row whose values are being read."""

    origin: str
    notes: set[str] = field(default_factory=set)
    """What the user should know about how it was read."""
    rules: Rules = Rules.NOW


def string(value: Any, column: str, context: RowContext) -> str:
    """A value as text; null is empty.

    Raises:
        DataError: it is not text, or contains something that is not a character.
    """
    if value is None:
        return ""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        context.notes.add(NUMBERS)
        return json.dumps(value)
    if not isinstance(value, str):
        kind = "NaN" if value != value else type(value).__name__
        raise BadValueError(f"{column!r} must be text, found {kind}", value, where=context.origin)
    if "\0" in value:
        raise DataError(f"{column!r} contains a null character", where=context.origin, fix="delete it")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{column!r} contains half a surrogate pair, which is not a character", where=context.origin)
    return value


def nonempty(value: Any, column: str, context: RowContext) -> str:
    """A value as text that is not empty.

    Raises:
        DataError: it is empty, or not text.
    """
    text = string(value, column, context)
    if not _has_visible_text(text, context):
        raise DataError(f"an empty {column!r}", where=context.origin, fix="delete the row or fill it in")
    return text


def answer_of(value: Any, column: str, context: RowContext) -> str:
    """An answer's text.

    Raises:
        DataError: it is empty, or not text.
    """
    answer = string(value, column, context)
    if not _has_visible_text(answer, context):
        raise EmptyAnswerError(
            f"a row without an answer: {column!r} is empty", where=context.origin, fix="delete the row or fill it in"
        )
    return answer


def _has_visible_text(text: str, context: RowContext) -> bool:
    """Whether any character of a text is visible; by earlier versions' rules, whether any is not white space."""
    if context.rules < Rules.NOW:
        return bool(text.strip())
    return any(
        not character.isspace() and unicodedata.category(character) not in INVISIBLE and character not in BLANK
        for character in text
    )


def joined_parts(value: Any, column: str, context: RowContext) -> Any:
    """A message's content; a list of text parts, as OpenAI writes them, is joined, and anything else is returned unchanged.

    Raises:
        DataError: a part is not text.
    """
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise (
                tool_fault(f"{column!r} has a part of type {kind}", context)
                if kind in TOOLS
                else _media_fault(f"{column!r} has a part of type {kind}", context)
            )
        if kind is None or not isinstance(part.get("text"), str):
            return value
    context.notes.add(PARTS)
    return "".join(part["text"] for part in value)


def refuse_media(values: Mapping[str, Any], what: str, context: RowContext) -> None:
    """Refuse a row or turn that comes with images or audio: its text makes little sense without them.

    Raises:
        DataError: it has some.
    """
    for name in MEDIA & values.keys():
        if values[name] and context.rules > Rules.V0_5:
            raise _media_fault(f"{what} has {name!r}", context)


def literal(text: str) -> Any:
    """The list or object that a text contains as JSON or as a Python literal; None if it is neither."""
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
            # For a backslash that begins no escape: a DeprecationWarning before Python 3.12, a SyntaxWarning since.
            for kind in (SyntaxWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)
            return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _outside_strings(text: str) -> int:
    """The number of characters outside of string literals in a text of Python."""
    for escape in ESCAPES:
        text = text.replace(escape, "")
    return len(STRING.sub("", text))


def tool_fault(what: str, context: RowContext) -> DataError:
    """The fault of a row with tools or tool calls."""
    return DataError(
        f"{what}: nybble does not train tool calls",
        where=context.origin,
        fix="remove these rows, or write the calls as text",
    )


def _media_fault(what: str, context: RowContext) -> DataError:
    """The fault of a row with images or audio."""
    return DataError(
        f"{what}: nybble trains on text only",
        where=context.origin,
        fix="remove these rows, or only that part if the text makes sense without it",
    )
