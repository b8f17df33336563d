"""Lists of turns, in whichever way they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nybble.data.rows.formats.conversation import EmptyAnswerError, Message, Role, ShownError
from nybble.data.rows.formats.values import (
    TOOLS,
    RowContext,
    answer_of,
    filled,
    joined,
    literal,
    no_tools,
    refuse_media,
    string,
)
from nybble.errors import DataError

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "claude": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatbot": "assistant",
    "input": "user", "output": "assistant",
}  # fmt: skip
WRITTEN = "turns written as text are read as turns"
UNNAMED = "messages without roles are read as user and assistant, alternating"
SPEAKER = ("role", "from")
SPEECH = ("content", "value", "text")


def history(value: Any, column: str, context: RowContext) -> Iterator[Message]:
    """The turns before an alpaca row's own, as LLaMA-Factory writes them.

    Raises:
        DataError: they are not pairs of texts.
    """
    pairs = _unwritten(value, context)
    for pair in pairs if isinstance(pairs, list) else [pairs] if pairs else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ShownError(f"{column!r} must be a list of [question, answer], found", value, where=context.origin)
        yield Message("user", filled(pair[0], f"question in {column}", context))
        yield Message("assistant", answer_of(pair[1], f"answer in {column}", context))


def is_turn(value: Any) -> bool:
    """Whether a value says who speaks, and what."""
    return _key_of(value, SPEAKER) is not None and _key_of(value, SPEECH) is not None


def _unwritten(value: Any, context: RowContext) -> Any:
    """A value, or what its text stands for as JSON or as Python prints it."""
    found = literal(value) if isinstance(value, str) else None
    if found is None:
        return value
    context.notes.add(WRITTEN)
    return found


def listed(value: Any) -> list[Any] | None:
    """A value as a list of turns, written as a list or as its text; None where it is something else."""
    found = literal(value) if isinstance(value, str) else value
    return found if isinstance(found, list) and found and is_turn(found[0]) else None


def turns_of(value: Any, column: str, context: RowContext) -> Iterator[Message]:
    """Turns that alternate user and assistant after at most one system message, and end with an answer.

    Raises:
        DataError: what is wrong with which of them.
    """
    turns = _unwritten(value, context)
    if not isinstance(turns, list) or not turns:
        what = f"{column!r} must be a list of turns, {{role, content}} or {{from, value}}"
        if not isinstance(turns, str):
            raise DataError(what, where=context.origin)
        raise ShownError(
            f"{what}; its text is neither JSON nor a list as Python prints it",
            value,
            where=context.origin,
            fix="write the turns as JSON; from pandas: frame.to_json('rows.jsonl', orient='records', lines=True)",
        )
    if all(isinstance(turn, str) for turn in turns):
        turns = _spelt_out(turns, context)
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
                fix="merge consecutive messages of one speaker; a conversation begins with the user",
            )  # fmt: skip
        yield message
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or message.role == "system":
        raise EmptyAnswerError(
            "a row without an answer: the conversation ends before the assistant speaks", where=context.origin
        )


def _turn(turn: Any, number: int, context: RowContext) -> Message:
    speaker, speech = _key_of(turn, SPEAKER), _key_of(turn, SPEECH)
    if speaker is None or speech is None:
        raise ShownError(
            f"message {number} must have role and content, or from and value; found", turn, where=context.origin
        )
    role = turn[speaker] if isinstance(turn[speaker], str) else repr(turn[speaker])
    if role.lower() in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise no_tools(f"message {number} is from or for a tool", context)
    refuse_media(turn, f"message {number}", context)
    if role.lower() not in ROLES:
        raise DataError(
            f"message {number}: {speaker} {role!r:.40} is not one of {', '.join(ROLES)}", where=context.origin
        )
    name = ROLES[role.lower()]
    for key, usual in (("weight", (None, 1)), ("train", (None, True))):
        if name == "assistant" and turn.get(key) not in usual:
            raise DataError(
                f"message {number} has {key} {turn[key]!r:.20}; nybble gives every answer the same weight", where=context.origin,
                fix=f"delete the {key}, or set data.train_on=last where only the last answer should count",
            )  # fmt: skip
    read = answer_of if name == "assistant" else filled if name == "user" else string
    column = f"{speech} of message {number}"
    return Message(name, read(joined(turn[speech], column, context), column, context))


def _spelt_out(turns: list[str], context: RowContext) -> list[Any]:
    """Turns that are texts: each is a turn as JSON, or what user and assistant say in turn."""
    decoded = [literal(turn) for turn in turns]
    if all(isinstance(turn, dict) for turn in decoded):
        context.notes.add(WRITTEN)
        return decoded
    context.notes.add(UNNAMED)
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def _key_of(turn: Any, keys: Sequence[str]) -> str | None:
    """Which of the keys a turn has, preferably one that is not null."""
    present = [key for key in keys if isinstance(turn, dict) and key in turn]
    return next((key for key in present if turn[key] is not None), present[0] if present else None)
