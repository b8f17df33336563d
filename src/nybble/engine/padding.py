"""Attention over rows with padding. Padded positions get the same result as with Transformers' masks.

A token sees the real tokens before it. So padding on the right sees the real tokens of its row and no padding, and padding on
the left sees nothing, for which torch's attention returns zeros. These results are rarely used, but the labels of padding may
be trained, and generation without a cache reads the last position of each row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.engine.attention.backend import Backend, BackendState, Gradients, Segments
from nybble.plan import ledger
from nybble.plan.shapes import LayerShape

Span = tuple[int, int]
"""Start and end of the real tokens of a row; (length, length) where there are none."""


@dataclass(frozen=True)
class Padding:
    """The padded positions of a batch, counted over all its rows."""

    positions: torch.Tensor
    """All padded positions."""
    blind: torch.Tensor
    """Padding before the first real token of its row, which sees nothing."""
    late: torch.Tensor
    """Padding after the last real token of its row."""
    seen: torch.Tensor
    """The real tokens that the late padding sees."""
    across: Segments
    """The late padding as queries, with the seen tokens as keys."""


def spans_of(mask: torch.Tensor) -> list[Span] | None:
    """The real tokens of each row of a mask (batch, length), or None where a row has holes between them."""
    real, length = mask.bool(), mask.shape[1]
    first, last = real.int().argmax(dim=1), length - real.flip(1).int().argmax(dim=1)
    rows = torch.stack((first, last, real.sum(dim=1)), dim=1).tolist()
    if any(count not in (0, end - begin) for begin, end, count in rows):
        return None
    return [(begin, end) if count else (length, length) for begin, end, count in rows]


def separate(spans: Sequence[Span], length: int, device: torch.device) -> tuple[Segments, Padding | None]:
    """How padded rows are divided into sequences, and where the padding is.

    Padding on the left is a sequence of its own. Padding on the right stays in its row: no real token sees it.
    """
    if all(span == (0, length) for span in spans):
        return Segments(len(spans), length), None
    starts = [row * length for row in range(len(spans))]
    blind = [range(start, start + begin) for start, (begin, _) in zip(starts, spans, strict=True)]
    followed = [row for row, (begin, end) in enumerate(spans) if begin < end < length]
    late = [range(starts[row] + spans[row][1], starts[row] + length) for row in followed]
    seen = [range(starts[row] + spans[row][0], starts[row] + spans[row][1]) for row in followed]
    edges = {*starts, *(part.stop for part in blind), len(spans) * length}
    across = _packed(late, device, seen=_packed(seen, device))
    positions, of_blind, of_late, of_seen = (_positions(part, device) for part in ([*blind, *late], blind, late, seen))
    padding = Padding(positions, of_blind, of_late, of_seen, across)
    if len(edges) == len(spans) + 1:
        return Segments(len(spans), length), padding
    bounds = sorted(edges)
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    return Segments(len(spans), length, torch.tensor(bounds, dtype=torch.int32).to(device), longest), padding


def _packed(parts: Sequence[range], device: torch.device, seen: Segments | None = None) -> Segments:
    sizes = [len(part) for part in parts]
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32).to(device)
    return Segments(1, sum(sizes), bounds, max(sizes, default=0), seen, causal=seen is None)


def _positions(parts: Sequence[range], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(part.start, part.stop) for part in (*parts, range(0))]).to(device)


class PaddedAttention:
    """A backend for one padded batch: one backend computes its rows, another one what late padding sees."""

    def __init__(self, rows: Backend, across: Backend, padding: Padding) -> None:
        self.name = rows.name
        self.rows = rows
        self.across = across
        self.padding = padding

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        padding = self.padding
        out, saved = self.rows.forward(query, key, value, segments)
        out.index_fill_(0, padding.blind, 0)
        late_state: BackendState = ()
        if len(padding.late):
            late, seen_key, seen_value = self._parts(query, key, value)
            result, late_state = self.across.forward(late, seen_key, seen_value, padding.across)
            out.index_copy_(0, padding.late, result)
        return out, (saved, late_state)

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
        """See `Backend.backward`; `gradient` is zeroed at the padding."""
        padding, (rows_state, late_state) = self.padding, saved
        late = gradient.index_select(0, padding.late)
        # A query whose result has no gradient passes none on to what it saw.
        gradient.index_fill_(0, padding.positions, 0)
        to_query, to_key, to_value = self.rows.backward(gradient, query, key, value, out, rows_state, segments)
        if len(padding.late):
            parts, result = self._parts(query, key, value), out.index_select(0, padding.late)
            to_late, *to_seen = self.across.backward(
                late, *parts, out=result, saved=late_state, segments=padding.across
            )
            to_query.index_copy_(0, padding.late, to_late)
            for whole, part in zip((to_key, to_value), to_seen, strict=True):
                whole.index_add_(0, padding.seen, part)
        return to_query, to_key, to_value

    def extra_bytes(self, shape: LayerShape) -> int:
        """Device bytes that a layer's backward needs for padding on the right, beside those for unpadded rows."""
        return ledger.padding_bytes(shape, len(self.padding.late), len(self.padding.seen))

    def _parts(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Gradients:
        seen = self.padding.seen
        return query.index_select(0, self.padding.late), key.index_select(0, seen), value.index_select(0, seen)
