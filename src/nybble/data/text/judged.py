"""Judged answers as token ids: the prompt once, then one or two answers, shortened together if they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nybble.data.rows.formats import Judged, Target
from nybble.data.text.fit import last_answer
from nybble.data.text.tokens import Tokens
from nybble.errors import DataError

LEAST = 2  # tokens of a shortened answer: one of its own, and the one that ends it


@dataclass(frozen=True)
class JudgedTokens:
    """What is known of a judged answer besides its own tokens, which follow the prompt's in the row."""

    prompt: int
    """The number of the prompt's tokens, with which both answers of a pair begin."""
    rejected: list[int] = field(default_factory=list)
    """The rejected answer's tokens, without the prompt; empty for a single answer."""
    is_good: bool = True
    """The label of a single answer."""


def judged_tokens(
    texts: Sequence[Tokens], judged: Judged, target: Target, train_prompt: bool
) -> list[tuple[Tokens, JudgedTokens]]:
    """A tokenised row as judged answers; only the last answer of each conversation is judged.

    Args:
        texts: the conversation, and for a pair the one with the rejected answer.
        judged: the row.
        target: with `labels`, the answers of a pair become a good and a bad one.
        train_prompt: whether the prompt's tokens are trained as well, as ORPO can.

    Raises:
        DataError: the template renders the prompt differently before the two answers, or the answers alike.
    """
    parts = [_divided(tokens) for tokens in texts]
    prompt, answer = parts[0]
    if any(other != prompt for other, _ in parts[1:]):
        raise DataError(
            "the template renders the prompt differently before the two answers",
            fix="use a template that renders a prompt without looking at its answer, such as data.template=model",
        )
    if len(parts) == 2 and parts[1][1] == answer:
        raise DataError(
            "the chosen and the rejected answer have the same tokens: the row prefers nothing", fix="delete the row"
        )
    if target == "pairs":
        return [(_joined(prompt, answer, train_prompt), JudgedTokens(len(prompt), parts[1][1]))]
    goods = [judged.is_good] if len(parts) == 1 else [True, False]
    return [
        (_joined(prompt, each, train_prompt), JudgedTokens(len(prompt), is_good=good))
        for (_, each), good in zip(parts, goods, strict=True)
    ]


def fitted(tokens: Tokens, judged: JudgedTokens, length: int, end_id: int) -> tuple[Tokens, JudgedTokens] | None:
    """A judged row in which each answer with its prompt has at most `length` tokens; shortened answers end with `end_id`.

    None if the prompt leaves no room, or if nothing is left in which two answers differ.
    """
    prompt, room = tokens.ids[: judged.prompt], length - judged.prompt
    answers = [tokens.ids[judged.prompt :], judged.rejected]
    if all(len(answer) <= room for answer in answers):
        return tokens, judged
    if room < LEAST:
        return None
    short = [answer if len(answer) <= room else [*answer[: room - 1], end_id] for answer in answers]
    if short[0] == short[1]:
        return None
    train_prompt = any(tokens.trained[: judged.prompt])
    return _joined(prompt, short[0], train_prompt), JudgedTokens(judged.prompt, short[1], judged.is_good)


def _divided(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Prompt and last answer; what the template writes after the answer is left out."""
    trained = last_answer(tokens).trained
    start = trained.index(True)
    end = start + sum(trained)
    return tokens.ids[:start], tokens.ids[start:end]


def _joined(prompt: list[int], answer: list[int], train_prompt: bool) -> Tokens:
    return Tokens([*prompt, *answer], [train_prompt] * len(prompt) + [True] * len(answer))
