"""Finds the answers of a long conversation in its rendering, in time linear in its length."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

MAX_RENDERED = 16  # the prompts of this many answers are rendered; later, only those at powers of two and the last
Span = tuple[int, int]
Slots = Mapping[tuple[int, str], re.Match[str]]


def answer_spans(
    text: str, roles: Sequence[str], slots: Slots, prompt_length: Callable[[int], int], close: Callable[[int], int]
) -> list[Span]:
    """The span of each answer, from the end of its prompt to the end of the control token that closes it.

    Rendering the prompt of every answer would take time quadratic in the number of turns: 11 s for 2,000 of them. A later answer
    is therefore assumed to begin where an earlier one did after the same text of the template. The prompt that a model generates
    from is compared with its own rendering in any case.

    Args:
        text: the conversation as rendered by the template.
        roles: of the messages.
        slots: the matches of the messages' texts, by message number and field.
        prompt_length: renders the prompt of an answer and returns its number of characters.
        close: returns the end of the control token that closes the answer ending at a position.
    """
    answers = [n for n, role in enumerate(roles) if role == "assistant"]
    ends: dict[str, int] = {}  # template text before an answer -> where its prompt ends, relative to the answer
    spans = []
    for count, n in enumerate(answers):
        begin = slots[n, "c"].start()
        before = max((slots[n - 1, field].end() for field in "ci" if (n - 1, field) in slots), default=0)
        before_answer = text[before:begin]
        is_power = count & (count - 1) == 0
        if count < MAX_RENDERED or is_power or n == answers[-1] or before_answer not in ends:
            ends[before_answer] = prompt_length(n) - begin
        spans.append((begin + ends[before_answer], close(slots[n, "c"].end())))
    return spans


def is_within(position: int, spans: Sequence[Span]) -> bool:
    """Whether a position is in one of these spans, which are in order and do not overlap."""
    last = bisect.bisect_right(spans, position, key=lambda span: span[0]) - 1
    return last >= 0 and position < spans[last][1]
