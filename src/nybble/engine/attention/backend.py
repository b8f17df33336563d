"""Causal attention, forward and backward apart, so that a layer may keep its result and recompute its inputs.

Every backend takes rows of tokens: query (tokens, heads, head size), key and value (tokens, key-value heads, head size),
strided as they come out of the fused projection, and gives out (tokens, heads, head size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

BackendState = tuple[Any, ...]
"""What a backend's backward needs beside inputs and result."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of query, key and value."""


@dataclass(frozen=True)
class Segments:
    """How the rows of a batch fall into sequences that do not see each other."""

    batch: int
    length: int
    bounds: torch.Tensor | None = None
    """(sequences + 1,) int32 where each begins and the last ends, for packed rows; without it, `batch` equal ones."""
    longest: int = 0
    """Tokens of the longest, for packed rows."""
    seen: Segments | None = None
    """Sequences of keys that those of queries see whole, one each, both packed; without it a token sees those before it."""

    @property
    def keys(self) -> Segments:
        """How the keys fall into sequences."""
        return self.seen or self

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Backend(Protocol):
    """One way to compute attention."""

    name: str

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        """The result, and what backward needs beside it (the log of the softmax's sum; random states)."""

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
        """Gradients of query, key and value, in their shapes."""


def repeated(query: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Key or value heads, (tokens, heads, head size), repeated for the query heads that share them."""
    return tuple(part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in parts)


def narrowed(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient of so many heads: the sum over the query heads that share each."""
    if gradient.shape[1] == heads:
        return gradient
    narrowed: torch.Tensor = gradient.unflatten(1, (heads, -1)).sum(dim=2)
    return narrowed
