"""What the decoder asks of whoever computes: room for a sequence, its prompt, and one token for each of many rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Visit = Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], None]
"""Called with the last layer's output, (tokens of all parts, hidden), and with what makes logits, (tokens, vocabulary), of it."""


class CacheSlot(Protocol):
    """One sequence's keys and values."""

    length: int
    """Tokens that are in it."""
    adapter: str | None
    """Which adapter it is computed with; None for the base itself."""


class Steps(Protocol):
    """A model, its cache, and how both are computed with; for one thread."""

    about: str
    """What computes, in a few words."""
    rows: int
    """That one call of `decode` takes, at most."""
    chunk: int
    """Tokens of a prompt that are computed between two steps, at most."""
    tokens: int
    """That the whole cache holds."""
    asynchronous: bool
    """Whether the calls return before the device has computed what they return."""

    def warm_up(self) -> None:
        """Prepare what the first answers would otherwise wait for."""

    def reserve(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> CacheSlot | None:
        """Room for a sequence, with what others have computed of its beginning; its last token is never among that.

        Args:
            prompt: its tokens, as far as others may have computed them.
            adapter: its adapter.
            tokens: of prompt and answer.

        Returns:
            None where there is no room now.
        """

    def prefill(
        self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]], visit: Visit | None = None
    ) -> torch.Tensor:
        """Append tokens of prompts to their slots; logits after the last of each, (slots, vocabulary) float32.

        Nothing is appended if it raises.

        Args:
            slots: of `reserve`.
            parts: the tokens to append to each.
            visit: is called once, before anything is appended.
        """

    def decode(self, slots: Sequence[CacheSlot], ids: torch.Tensor) -> torch.Tensor:
        """Append one token to each slot; logits after them, (rows, vocabulary) float32, valid until the next call.

        Args:
            slots: the same objects in the same order as in the call before are computed soonest.
            ids: (rows,) int64, on the device.
        """

    def verify(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits after each of some tokens that follow what is in the slots; their lengths stay as they are.

        Args:
            slots: of sequences whose prompts are computed.
            parts: tokens for each, `rows` together at most.

        Returns:
            (tokens, vocabulary) float32, valid until the next call.
        """

    def release(self, slot: CacheSlot, ids: Sequence[int]) -> None:
        """Give a slot back, and keep its keys and values for sequences that begin alike while nobody needs the room.

        Args:
            slot: of `reserve`.
            ids: the tokens in it that are known, at most `slot.length` of them, from the first on.
        """
