"""Lists of turns, in all the ways that they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nybble.data.rows.formats.conversation import BadValueError, EmptyAnswerError, Message, Role
from nybble.data.rows.formats.values import (
    TOOLS,
    RowContext,
    answer_of,
    joined_parts,
    literal,
    nonempty,
    refuse_media,
    string,
    tool_fault,
)
from nybble.errors import DataError

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "claude": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatbot": "assistant",
    "input": "user", "output": "assistant",
}  # fmt: skip
TURNS_AS_TEXT = "turns written as text are read as turns"
TURNS_WITHOUT_ROLES = "messages without roles are read as user and assistant, alternating"
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")


def history(value: Any, column: str, context: RowContext) -> Iterator[Message]:
    """The turns that precede an alpaca row's own, as LLaMA-Factory writes them.

    Raises:
        DataError: they are not pairs of texts.
    """
    pairs = _parsed(value, context)
    for pair in pairs if isinstance(pairs, list) else [pairs] if pairs else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadValueError(f"{column!r} must be a list of [question, answer], found", value, where=context.origin)
        yield Message("user", nonempty(pair[0], f"question in {column}", context))
        yield Message("assistant", answer_of(pair[1], f"answer in {column}", context))


def is_turn(value: Any) -> bool:
    """Whether a value has a role and a content."""
    return _key_of(value, ROLE_KEYS) is not None and _key_of(value, CONTENT_KEYS) is not None


def _parsed(value: Any, context: RowContext) -> Any:
    """A value; a text that is JSON or a Python literal is parsed."""
    parsed = literal(value) if isinstance(value, str) else None
    if parsed is None:
        return value
    context.notes.add(TURNS_AS_TEXT)
    return parsed


def turn_list(value: Any) -> list[Any] | None:
    """A value that is a list of turns, or the text of one, as a list; None for anything else."""
    parsed = literal(value) if isinstance(value, str) else value
    return parsed if isinstance(parsed, list) and parsed and is_turn(parsed[0]) else None


def turns_of(value: Any, column: str, context: RowContext) -> Iterator[Message]:
    """Turns that alternate between user and assistant after at most one system message, and end with an answer.

    Raises:
        DataError: a turn is faulty, or they do not alternate.
    """
    turns = _parsed(value, context)
    if not isinstance(turns, list) or not turns:
        what = f"{column!r} must be a list of turns, {{role, content}} or {{from, value}}"
        if not isinstance(turns, str):
            raise DataError(what, where=context.origin)
        raise BadValueError(
            f"{what}; its text is neither JSON nor a list as Python prints it",
            value,
            where=context.origin,
            fix="write the turns as JSON; from pandas: frame.to_json('rows.jsonl', orient='records', lines=True)",
        )
    if all(isinstance(turn, str) for turn in turns):
        turns = _as_dicts(turns, context)
    expected: Role = "user"
    for number, turn in enumerate(turns, 1):
        message = _turn(turn, number, context)
        if message.role == "system" and number == 1:
            if message.content.strip():
                yield message
            continue
        if message.role != expected:
            raise DataError(
                f"message {number} is from {message.role}, expected {expected}: turns alternate", where=context.origin,
                fix="merge consecutive messages of one role; a conversation begins with the user",
            )  # fmt: skip
        yield message
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or message.role == "system":
        raise EmptyAnswerError(
            "a row without an answer: the conversation ends before the assistant speaks", where=context.origin
        )


def _turn(turn: Any, number: int, context: RowContext) -> Message:
    role_key, content_key = _key_of(turn, ROLE_KEYS), _key_of(turn, CONTENT_KEYS)
    if role_key is None or content_key is None:
        raise BadValueError(
            f"message {number} must have role and content, or from and value; found", turn, where=context.origin
        )
    role = turn[role_key] if isinstance(turn[role_key], str) else repr(turn[role_key])
    if role.lower() in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise tool_fault(f"message {number} is from or for a tool", context)
    refuse_media(turn, f"message {number}", context)
    if role.lower() not in ROLES:
        raise DataError(
            f"message {number}: {role_key} {role!r:.40} is not one of {', '.join(ROLES)}", where=context.origin
        )
    name = ROLES[role.lower()]
    for key, usual in (("weight", (None, 1)), ("train", (None, True))):
        if name == "assistant" and turn.get(key) not in usual:
            raise DataError(
                f"message {number} has {key} {turn[key]!r:.20}; nybble gives every answer the same weight", where=context.origin,
                fix=f"delete the {key}, or set data.train_on=last where only the last answer should count",
            )  # fmt: skip
    read = answer_of if name == "assistant" else nonempty if name == "user" else string
    column = f"{content_key} of message {number}"
    return Message(name, read(joined_parts(turn[content_key], column, context), column, context))


def _as_dicts(turns: list[str], context: RowContext) -> list[Any]:
    """Turns given as texts: each text is a turn as JSON, or else user and assistant alternate."""
    decoded = [literal(turn) for turn in turns]
    if all(isinstance(turn, dict) for turn in decoded):
        context.notes.add(TURNS_AS_TEXT)
        return decoded
    context.notes.add(TURNS_WITHOUT_ROLES)
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def _key_of(turn: Any, keys: Sequence[str]) -> str | None:
    """The first of the keys that a turn has, preferably one whose value is not null."""
    present = [key for key in keys if isinstance(turn, dict) and key in turn]
    return next((key for key in present if turn[key] is not None), present[0] if present else None)
