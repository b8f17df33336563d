"""Rows that judge answers: a chosen and a rejected one after the same prompt, or one that is good or bad."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nybble.data.rows.formats.conversation import BadValueError, Conversation, Message
from nybble.data.rows.formats.turns import ROLE_KEYS, ROLES, is_turn, turn_list, turns_of
from nybble.data.rows.formats.values import RowContext, answer_of, nonempty, string
from nybble.errors import DataError

Target = Literal["answers", "pairs", "labels"]
"""What rows are read for: answers to imitate, pairs of which one is preferred, or answers labelled as good or bad."""

TARGETS: Mapping[str, Target] = {
    "supervised": "answers",
    "dpo": "pairs",
    "orpo": "pairs",
    "simpo": "pairs",
    "kto": "labels",
}
"""By train.objective."""

TRANSCRIPT = "texts with \\n\\nHuman: and \\n\\nAssistant: are read as turns"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
LABELS = {"true": True, "false": False}


@dataclass(frozen=True)
class Judged:
    """A judged answer with its prompt, and for a pair the rejected answer to the same prompt."""

    conversation: Conversation
    """It ends with the answer that was chosen or labelled."""
    rejected: Conversation | None = None
    """The same conversation with the other last answer; None for a single answer."""
    is_good: bool = True
    """The label of a single answer."""


def pair_of(values: Mapping[str, Any], columns: Mapping[str, str], context: RowContext) -> Judged:
    """A row with a chosen and a rejected answer.

    Each is a text, or a list of turns with or without the prompt before it; without a column for the prompt, it is what both
    have before their last answer. Texts in the style of Anthropic's HH data set are turns as well.

    Args:
        values: chosen and rejected, and perhaps prompt and system.
        columns: the names of their columns.
        context: the row.

    Raises:
        DataError: the row is faulty; it names the `file:line`.
    """
    chosen, rejected = (_conversation(values, field, columns, context) for field in ("chosen", "rejected"))
    names = f"{columns['chosen']!r} and {columns['rejected']!r}"
    if chosen[:-1] != rejected[:-1]:
        number = next(
            (n for n, both in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), 1) if both[0] != both[1]), 0
        )
        where = f"in message {number}" if number else f"in length, {len(chosen)} and {len(rejected)} messages"
        raise DataError(
            f"{names} have different prompts: they differ {where}, before the last answer", where=context.origin,
            fix="only the last answers are compared, so what precedes them must be the same: correct or delete the row",
        )  # fmt: skip
    if chosen[-1] == rejected[-1]:
        raise DataError(
            f"{names} are the same answer: the row prefers nothing", where=context.origin, fix="delete the row"
        )
    return Judged(chosen, rejected)


def label_of(value: Any, column: str, context: RowContext) -> bool:
    """A label as true or false.

    Raises:
        DataError: it is something else.
    """
    label = LABELS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(label, bool):
        return label
    raise BadValueError(
        f"{column!r} must be true (a good answer) or false (a bad one), found", value, where=context.origin,
        fix="write it as true or false; a score has to be turned into one of them first",
    )  # fmt: skip


def _conversation(
    values: Mapping[str, Any], field: str, columns: Mapping[str, str], context: RowContext
) -> Conversation:
    """The prompt with one of the two answers."""
    value, column = values[field], columns[field]
    turns = _turns(value, context)
    if turns is None:
        turns = [{"role": "assistant", "content": answer_of(value, column, context)}]
    if _is_answer(turns[0]):
        turns = [*_prompt_turns(values, columns, column, context), *turns]
    elif "prompt" in columns and isinstance(values["prompt"], str):
        _check_prompt(values["prompt"], turns, columns, column, context)
    read = tuple(turns_of(turns, column, context))
    system = string(values.get("system"), columns.get("system", ""), context)
    return (Message("system", system), *read) if system.strip() and read[0].role != "system" else read


def _prompt_turns(values: Mapping[str, Any], columns: Mapping[str, str], column: str, context: RowContext) -> list[Any]:
    """The turns of the prompt, which must be in a column of its own."""
    if "prompt" not in columns:
        raise DataError(
            f"no prompt: {column!r} has only the answer, and the row has no column for what was asked", where=context.origin,
            fix="name the prompt's column: data.map={prompt: COLUMN}; or put the turns of the prompt before both answers",
        )  # fmt: skip
    value, name = values["prompt"], columns["prompt"]
    turns = _turns(value, context)
    if turns is None:
        return [{"role": "user", "content": nonempty(value, name, context)}]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _check_prompt(prompt: str, turns: list[Any], columns: Mapping[str, str], column: str, context: RowContext) -> None:
    """Refuse turns that contain their prompt, but another one than the prompt's own column."""
    asked = _turns(prompt, context) or [{"role": "user", "content": prompt}]
    texts = {str(turn.get("content", turn.get("value"))).strip() for turn in turns if isinstance(turn, dict)}
    users = [turn["content"].strip() for turn in asked if isinstance(turn, dict) and turn.get("role") == "user"]
    if users and users[-1] not in texts:
        raise DataError(
            f"{column!r} answers another prompt than {columns['prompt']!r}", where=context.origin,
            fix="correct or delete the row; or, if the column is something else, rename it",
        )  # fmt: skip


def _turns(value: Any, context: RowContext) -> list[Any] | None:
    """A value as a list of turns; None for a text without speakers."""
    if (turns := turn_list(value)) is not None:
        return turns
    if is_turn(value):
        return [value]
    if not isinstance(value, str) or SPEAKER.match(value) is None:
        return None
    context.notes.add(TRANSCRIPT)
    _, *parts = SPEAKER.split(value)
    speakers = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()} for speaker, text in speakers
    ]


def _is_answer(turn: Any) -> bool:
    """Whether a turn is the assistant's."""
    role = next((turn[key] for key in ROLE_KEYS if isinstance(turn, dict) and key in turn), None)
    return isinstance(role, str) and ROLES.get(role.lower()) == "assistant"
