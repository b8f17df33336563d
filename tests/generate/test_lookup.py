"""Drafts from passages that came before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nybble.generate.decoder.lookup import FIRST_PAUSE, LONGEST_PAUSE, PromptLookup


def test_a_draft_is_what_followed_the_same_three_tokens_the_last_time():
    lookup = PromptLookup([1, 2, 3, 10, 11, 1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27, 1, 2])
    assert lookup.draft(7) == []
    lookup.add(3)
    assert lookup.draft(7) == [20, 21, 22]
    assert lookup.draft(2) == [20, 21]
    assert lookup.draft(0) == []


def test_drafts_grow_while_they_are_right_and_pause_while_they_are_wrong():
    lookup = PromptLookup([*range(20), *range(5)])
    assert lookup.draft(10) == [5, 6, 7]
    lookup.learn(3, 3)
    assert lookup.draft(10) == [5, 6, 7, 8, 9, 10, 11]
    lookup.learn(7, 2)
    assert lookup.draft(10) == [5, 6, 7]
    pauses = []
    for _ in range(6):
        lookup.learn(3, 0)
        pause = 0
        while not lookup.draft(1):
            lookup.add(pause % 20 if pause else 19)
            for token in range(3):
                if lookup.draft(1):
                    break
                lookup.add(token)
                pause += 1
            pause += 1
        pauses.append(pause)
    assert FIRST_PAUSE <= pauses[0] < pauses[2] < pauses[5] <= LONGEST_PAUSE + 4


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 8))
def test_a_draft_is_always_a_passage_that_came_after_the_same_tokens(tokens, most):
    draft = PromptLookup(tokens).draft(most)
    assert len(draft) <= most
    if draft:
        passage = [*tokens[-3:], *draft]
        assert any(tokens[n : n + len(passage)] == passage for n in range(len(tokens) - 3))
