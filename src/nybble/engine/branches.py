"""Attention over packed rows whose answers share a prompt: the prompt is in the row, and is computed, once.

position_ids say it. A segment of a row that starts at 0 is a new sequence. One that starts at p > 0 and does not continue the
segment before it is a branch: it sees the first p tokens of the first segment of its sequence (the trunk), and itself.

    prompt of 3 tokens, two answers of 2:   0 1 2 3 4 3 4
                                            trunk     branch, p = 3

Keys and values are gathered so that each branch's own have those of its prompt before them; queries stay where they are. In
backward, a prompt's gradients are added up in float32 and in a fixed order, so results are reproducible.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.engine.attention.backend import Backend, BackendState, Gradients, Segments
from nybble.errors import EngineError
from nybble.plan import ledger
from nybble.plan.shapes import LayerShape


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a batch, counted over all its rows."""

    start: int
    stop: int
    prefix: range
    """The tokens of its trunk that it sees; none for a trunk itself."""


@dataclass(frozen=True)
class Branches:
    """Where the keys of a batch with branches are."""

    gathered: torch.Tensor
    """The token of each key: (keys,)."""
    own: torch.Tensor
    """The key of each token among its own segment's: (tokens,)."""
    shared: torch.Tensor
    """The tokens that branches see: (shared,)."""
    rounds: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys before branches, and their places among the shared tokens, as (place, key); each round has one branch of every
    sequence, so that no place occurs twice."""


def segments_of(starts: Sequence[int], firsts: Sequence[int], length: int, tokens: int) -> list[Segment] | None:
    """The segments of a packed batch, or None if it has no branches.

    Args:
        starts: the first token of each segment, counted over all rows.
        firsts: its position.
        length: tokens of a row.
        tokens: of all rows.

    Raises:
        EngineError: a segment that is neither a sequence nor a branch.
    """
    if not any(first and start % length for start, first in zip(starts, firsts, strict=True)):
        return None
    segments: list[Segment] = []
    trunk, origin = range(0), 0
    for (start, stop), first in zip(itertools.pairwise([*starts, tokens]), firsts, strict=True):
        if first == 0 or start % length == 0:
            trunk, origin, prefix = range(start, stop), first, range(0)
        elif origin == 0 and 0 < first <= len(trunk):
            prefix = trunk[:first]
        else:
            raise _neither(divmod(start, length), first, trunk, origin)
        segments.append(Segment(start, stop, prefix))
    return segments


def _neither(place: tuple[int, int], first: int, trunk: range, origin: int) -> EngineError:
    row, token = place
    why = (
        f"the sequence before it starts at position {origin}, not 0" if origin else
        f"the sequence before it has only positions 0 to {len(trunk) - 1} before its first branch" if first > 0 else
        "positions start at 0"
    )  # fmt: skip
    return EngineError(
        f"position_ids go on with {first} at token {token} of row {row}, but {why}: a segment of a packed row starts at 0, or "
        "branches off where the first segment of its sequence has been or ends",
        fix="one row for each answer; or positions such as 0 1 2 3 4 3 4 for a prompt of 3 tokens with two answers of 2",
    )


def arrange(parts: Sequence[Segment], segments: Segments, device: torch.device) -> tuple[Segments, Branches]:
    """How queries and keys of a batch with branches are divided, and where its keys are.

    Args:
        parts: see `segments_of`.
        segments: the same without keys.
        device: where attention is computed.
    """
    ends = [0, *itertools.accumulate(len(part.prefix) + part.stop - part.start for part in parts)]
    longest = max(stop - start for start, stop in itertools.pairwise(ends))
    gathered = [piece for part in parts for piece in (part.prefix, range(part.start, part.stop))]
    own = [
        range(start + len(part.prefix), stop)
        for part, (start, stop) in zip(parts, itertools.pairwise(ends), strict=True)
    ]
    before: dict[int, list[range]] = defaultdict(list)
    """The keys before the branches of each trunk."""
    for part, start in zip(parts, ends, strict=False):
        if part.prefix:
            before[part.prefix.start].append(range(start, start + len(part.prefix)))
    shared = [range(trunk, trunk + max(map(len, keys))) for trunk, keys in before.items()]
    places = [0, *itertools.accumulate(map(len, shared))]
    lists = [gathered, own, shared]
    for number in range(max(map(len, before.values()))):
        keys = [(place, of[number]) for place, of in zip(places, before.values(), strict=False) if number < len(of)]
        lists += [[range(place, place + len(key)) for place, key in keys], [key for _, key in keys]]
    whole = torch.cat([_indices(pieces) for pieces in lists]).to(device)  # one copy to the device
    first, second, third, *others = whole.split([sum(map(len, pieces)) for pieces in lists])
    bounds = torch.tensor(ends, dtype=torch.int32).to(device)
    seen = Segments(1, ends[-1], bounds, longest)
    divided = Segments(segments.batch, segments.length, segments.bounds, segments.longest, seen)
    return divided, Branches(first, second, third, list(zip(others[::2], others[1::2], strict=True)))


def _indices(pieces: Sequence[range]) -> torch.Tensor:
    return torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])


class BranchedAttention:
    """A backend for one batch with branches: another one computes it over the gathered keys."""

    def __init__(self, packed: Backend, branches: Branches) -> None:
        self.name = packed.name
        self.packed = packed
        self.branches = branches

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        return self.packed.forward(query, *self._gathered(key, value), segments)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: BackendState,
        segments: Segments,
    ) -> Gradients:
        """See `Backend.backward`. Keys and values are gathered again: a layer keeps them once."""
        parts = self._gathered(key, value)
        to_query, to_keys, to_values = self.packed.backward(gradient, query, *parts, out, saved, segments)
        del parts
        return to_query, self._summed(to_keys), self._summed(to_values)

    def extra_bytes(self, shape: LayerShape) -> int:
        """Device bytes that a layer's backward needs for branches, beside those for rows without."""
        return ledger.branch_bytes(shape, len(self.branches.gathered))

    def _gathered(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key.index_select(0, self.branches.gathered), value.index_select(0, self.branches.gathered)

    def _summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of each token's key or value, (tokens, heads, head size), from those of all gathered ones."""
        branches = self.branches
        result = gradient.index_select(0, branches.own)
        sums = result.index_select(0, branches.shared).float()
        for places, keys in branches.rounds:
            sums.index_add_(0, places, gradient.index_select(0, keys).float())
        return result.index_copy_(0, branches.shared, sums.to(result.dtype))
