"""Where the answers of a long conversation are in its rendering, found in time linear in its length."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

MOST_RENDERED = 16  # answers whose prompts are each rendered; of later ones, those at powers of two and the last
Span = tuple[int, int]
Slots = Mapping[tuple[int, str], re.Match[str]]


def answer_spans(
    text: str, roles: Sequence[str], slots: Slots, prompt_length: Callable[[int], int], close: Callable[[int], int]
) -> list[Span]:
    """From the end of each answer's prompt to the end of the control token that closes it.

    To render the prompt of every answer takes time by the square of the turns: 11 s for 2,000 of them. So the prompt of a later
    answer ends where that of an earlier one did which follows the same words of the template. What a model generates from is held
    against its own rendering in any case.

    Args:
        text: the conversation as the template renders it.
        slots: where it has what the messages say, by their number and field.
        prompt_length: renders the prompt of an answer and tells its characters.
        close: where the control token ends that closes an answer which ends there.
    """
    answers = [n for n, role in enumerate(roles) if role == "assistant"]
    ends: dict[str, int] = {}  # what the template writes before an answer: how far from the answer its prompt ends
    spans = []
    for count, n in enumerate(answers):
        begin = slots[n, "c"].start()
        before = max((slots[n - 1, field].end() for field in "ci" if (n - 1, field) in slots), default=0)
        before_answer = text[before:begin]
        is_power = count & (count - 1) == 0
        if count < MOST_RENDERED or is_power or n == answers[-1] or before_answer not in ends:
            ends[before_answer] = prompt_length(n) - begin
        spans.append((begin + ends[before_answer], close(slots[n, "c"].end())))
    return spans


def is_within(position: int, spans: Sequence[Span]) -> bool:
    """Whether a character is in one of these spans, which are in order and do not overlap."""
    last = bisect.bisect_right(spans, position, key=lambda span: span[0]) - 1
    return last >= 0 and position < spans[last][1]
