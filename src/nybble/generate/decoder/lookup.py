"""Prompt lookup: an answer that repeats a passage of its prompt, or its own, probably goes on as the passage does.

The drafted tokens are verified by one step, which costs little more than a step of one token; those that the model would have
chosen anyway are kept, so no answer changes (Leviathan et al. 2023; drafts from n-grams: Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

SPECULATING_ROWS = 2  # at most: with four, chats lose 4% of their speed (docs/experiments.md)
VERIFIED_TOKENS = 8  # of one step, which takes up to eight rows in one tile
NGRAM = 3  # tokens that must be the same; two match by chance several times as often
SHORT, LONG = 3, 7  # tokens of a draft: at first, and once a whole draft was right
FIRST_PAUSE, LONGEST_PAUSE = 4, 64  # tokens without a draft after one that was wrong from its first token on


class PromptLookup:
    """Drafts for one sequence.

    Args:
        prompt: its tokens.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._after: dict[tuple[int, ...], int] = {}
        """Where the tokens begin that followed each n-gram the last time, the latest n-gram left out."""
        self._indexed = NGRAM
        """From which token on `_after` knows nothing; a busy decoder never asks, and nothing is indexed for it."""
        self._length = SHORT
        self._pause = self._silent = 0

    def add(self, token: int) -> None:
        """The next token of the sequence."""
        self._tokens.append(token)
        self._silent = max(0, self._silent - 1)

    def draft(self, most: int) -> list[int]:
        """Tokens that may come next, at most so many; none where nothing like it was there before."""
        if self._silent:
            return []
        for place in range(self._indexed, len(self._tokens)):
            self._after[tuple(self._tokens[place - NGRAM : place])] = place
        self._indexed = max(self._indexed, len(self._tokens))
        start = self._after.get(tuple(self._tokens[-NGRAM:]))
        return [] if start is None else self._tokens[start : start + min(most, self._length)]

    def learn(self, drafted: int, accepted: int) -> None:
        """How many tokens of the last draft were right."""
        self._length = LONG if accepted == drafted else SHORT
        if accepted:
            self._pause = 0
        else:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause or FIRST_PAUSE)
            self._silent = self._pause
