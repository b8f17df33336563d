"""Lists of turns, in whichever way they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nybble.data.formats.conversation import EmptyAnswerError, Message, Role
from nybble.data.formats.values import answer_of, filled, string
from nybble.errors import DataError

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "claude": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatbot": "assistant",
    "input": "user", "output": "assistant",
}  # fmt: skip
TOOLS = frozenset({"tool", "tool_call", "tool_calls", "tool_response", "tool_responses", "tool_result", "function",
                   "function_call", "function_response", "observation", "ipython"})  # fmt: skip
SPEAKER = ("role", "from")
SPEECH = ("content", "value", "text")


def history(value: Any, column: str, origin: str) -> Iterator[Message]:
    """The turns before an alpaca row's own, as LLaMA-Factory writes them."""
    for pair in value if isinstance(value, list) else [value] if value else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{column!r} must be a list of [question, answer], found {value!r:.60}", where=origin)
        yield Message("user", filled(pair[0], f"question in {column}", origin))
        yield Message("assistant", answer_of(pair[1], f"answer in {column}", origin))


def turns_of(value: Any, column: str, origin: str) -> Iterator[Message]:
    """Turns that alternate user and assistant after at most one system message, and end with an answer."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{column!r} must be a list of turns, {{role, content}} or {{from, value}}", where=origin)
    expected: Role = "user"
    for place, turn in enumerate(value, 1):
        message = _turn(turn, place, origin)
        if message.role == "system" and place == 1:
            if message.content.strip():
                yield message
            continue
        if message.role != expected:
            raise DataError(
                f"message {place} is from {message.role}, expected {expected}: turns alternate", where=origin,
                fix="join what one speaker says in a row; a conversation begins with the user",
            )  # fmt: skip
        yield message
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or message.role == "system":
        raise EmptyAnswerError(
            "a row without an answer: the conversation ends before the assistant speaks", where=origin
        )


def _turn(turn: Any, place: int, origin: str) -> Message:
    speaker, speech = _key_of(turn, SPEAKER), _key_of(turn, SPEECH)
    if speaker is None or speech is None:
        raise DataError(
            f"message {place} must have role and content, or from and value; found {turn!r:.80}", where=origin
        )
    role = turn[speaker] if isinstance(turn[speaker], str) else repr(turn[speaker])
    if role.lower() in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise no_tools(f"message {place} is from or for a tool", origin)
    if role.lower() not in ROLES:
        raise DataError(f"message {place}: {speaker} {role!r:.40} is not one of {', '.join(ROLES)}", where=origin)
    name = ROLES[role.lower()]
    for key, usual in (("weight", (None, 1)), ("train", (None, True))):
        if name == "assistant" and turn.get(key) not in usual:
            raise DataError(
                f"message {place} has {key} {turn[key]!r:.20}; every answer counts the same here", where=origin,
                fix=f"delete the {key}, or set data.train_on=last where only the last answer should count",
            )  # fmt: skip
    read = answer_of if name == "assistant" else filled if name == "user" else string
    return Message(name, read(turn[speech], f"{speech} of message {place}", origin))


def _key_of(turn: Any, keys: Sequence[str]) -> str | None:
    """Which of the keys a turn has, and rather one that is not null."""
    present = [key for key in keys if isinstance(turn, dict) and key in turn]
    return next((key for key in present if turn[key] is not None), present[0] if present else None)


def no_tools(what: str, origin: str) -> DataError:
    return DataError(
        f"{what}: calls of tools are not trained", where=origin, fix="take these rows out, or write the calls as text"
    )
