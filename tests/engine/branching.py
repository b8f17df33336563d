"""Packed rows whose answers share a prompt, and the same as separate sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from nybble.engine.batch_layout import BatchLayout, layout_of


@dataclass(frozen=True)
class Sequence:
    """A trunk (prompt and first answer) of this many tokens; branches as (tokens of the trunk they see, own tokens)."""

    trunk: int
    branches: tuple[tuple[int, int], ...] = ()

    @property
    def positions(self) -> list[int]:
        """Those of its segments, one after another."""
        return [*range(self.trunk), *(place for seen, own in self.branches for place in range(seen, seen + own))]

    def is_clear(self) -> bool:
        """Whether no branch looks like the continuation of the segment before it."""
        ends = [self.trunk, *(seen + own for seen, own in self.branches)]
        return all(seen != end for (seen, _), end in zip(self.branches, ends, strict=False))

    def rows(self, start: int) -> list[tuple[list[int], int]]:
        """Its segments as separate sequences: the tokens of the batch in each, and how many of them are only seen."""
        found, place = [(list(range(start, start + self.trunk)), 0)], start + self.trunk
        for seen, own in self.branches:
            found.append(([*range(start, start + seen), *range(place, place + own)], seen))
            place += own
        return found


def separate_rows(sequences: list[Sequence]) -> list[tuple[list[int], int]]:
    """All segments of a batch as separate sequences; see `Sequence.rows`."""
    found, start = [], 0
    for sequence in sequences:
        found += sequence.rows(start)
        start += len(sequence.positions)
    return found


def positions_of(sequences: list[Sequence], device: str = "cpu") -> torch.Tensor:
    """(1, tokens)"""
    return torch.tensor([[place for sequence in sequences for place in sequence.positions]], device=device)


def layout(sequences: list[Sequence], device: str = "cpu") -> BatchLayout:
    """As the engine reads it."""
    positions = positions_of(sequences, device)
    return layout_of({"input_ids": torch.zeros_like(positions), "position_ids": positions})


def allowed(sequences: list[Sequence]) -> torch.Tensor:
    """Which tokens each token sees, (tokens, tokens)."""
    tokens = positions_of(sequences).shape[1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row, seen in separate_rows(sequences):
        for place in range(seen, len(row)):
            mask[row[place], row[: place + 1]] = True
    return mask


def masked_attention(parts: Any, mask: torch.Tensor, change: torch.Tensor) -> list[torch.Tensor]:
    """torch's attention in float32 with a mask, (tokens, heads, size), and the gradients of query, key and value."""
    exact = [part.detach().float().requires_grad_() for part in parts]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in exact), mask, enable_gqa=True
        )
    out = out[0].transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, exact, change.float())]


def sequences(longest: int = 12, branches: int = 4) -> st.SearchStrategy[Sequence]:
    """Any sequence with or without branches."""
    return (
        st.integers(1, longest)
        .flatmap(
            lambda trunk: st.lists(st.tuples(st.integers(1, trunk), st.integers(1, longest)), max_size=branches).map(
                lambda found: Sequence(trunk, tuple(found))
            )
        )
        .filter(Sequence.is_clear)
    )


PAIRS = [Sequence(11, ((8, 5),)), Sequence(4, ((3, 1),))]
GROUP = [Sequence(9, ((6, 4), (6, 1), (6, 7)))]
MIXED = [Sequence(7), Sequence(5, ((2, 3), (4, 6))), Sequence(1), Sequence(6, ((1, 2),)), Sequence(3)]
CASES = {"pairs": PAIRS, "a group": GROUP, "mixed": MIXED}
