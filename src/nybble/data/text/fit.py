"""Shortens rows that are longer than the length the model is trained on."""

from __future__ import annotations

from nybble.data.rows.formats import Conversation
from nybble.data.text.tokens import Tokens


def truncate(tokens: Tokens, length: int, end_id: int) -> Tokens | None:
    """At most `length` tokens, which end with a trained `end_id`; None if no answer is left."""
    trained = tokens.trained[:length]
    if trained[-1] and trained[-2]:
        return Tokens([*tokens.ids[: length - 1], end_id], trained)
    if trained[-1]:
        trained[-1] = False  # the first token alone is not an answer
    if not any(trained):
        return None
    end = last_trained(trained) + 1
    return Tokens(tokens.ids[:end], trained[:end])


def cut_text(tokens: Tokens, length: int) -> list[Tokens]:
    """A document in pieces of `length` tokens; only the last one ends with EOS."""
    starts = range(0, len(tokens.ids) - 1, length)  # EOS alone is not a piece
    return [Tokens(tokens.ids[start:][:length], tokens.trained[start:][:length]) for start in starts]


def halve(conversation: Conversation) -> tuple[Conversation, Conversation] | None:
    """A chat split in two, each part with the system message; None for a single question and answer."""
    opening = conversation[:1] if conversation[0].role == "system" else ()
    turns = conversation[len(opening) :]
    middle = len(turns) // 4 * 2
    return ((*opening, *turns[:middle]), (*opening, *turns[middle:])) if middle else None


def last_answer(tokens: Tokens) -> Tokens:
    """The tokens with only the last run of trained tokens still trained."""
    end = last_trained(tokens.trained)
    start = end
    while start and tokens.trained[start - 1]:
        start -= 1
    return Tokens(tokens.ids, [start <= position <= end for position in range(len(tokens.ids))])


def last_trained(trained: list[bool]) -> int:
    """The position of the last trained token."""
    return len(trained) - 1 - trained[::-1].index(True)
