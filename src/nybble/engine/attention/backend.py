"""Causal attention with separate forward and backward, so that a layer may keep its result and recompute its inputs.

Every backend takes rows of tokens: query (tokens, heads, head size), key and value (tokens, key-value heads, head size),
strided as they come out of the fused projection, and returns (tokens, heads, head size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

BackendState = tuple[Any, ...]
"""What a backend's backward needs beside inputs and output."""
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradients of query, key and value."""


@dataclass(frozen=True)
class Segments:
    """How the rows of a batch are divided into sequences that do not see each other."""

    batch: int
    length: int
    bounds: torch.Tensor | None = None
    """(sequences + 1,) int32, for packed rows: the start of each sequence and the end of the last; else `batch` equal ones."""
    longest: int = 0
    """Length of the longest sequence of packed rows."""
    seen: Segments | None = None
    """The sequences of keys, if they are others; both packed, and one for each sequence of queries."""
    causal: bool = True
    """Whether a token sees itself and what is before it: a sequence's last query sees all keys, and the one before it one key
    less. Otherwise each query sees all keys of its sequence."""

    @property
    def keys(self) -> Segments:
        """How the keys are divided into sequences."""
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
        """The output, and what else backward needs (the log of the softmax's sum; random states)."""

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
        """Gradients of query, key and value, each in its shape."""


def repeated(query: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Key or value heads, (tokens, heads, head size), repeated for the query heads that share them."""
    return tuple(part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in parts)


def narrowed(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient of this many heads: the sum over the query heads that share each."""
    if gradient.shape[1] == heads:
        return gradient
    narrowed: torch.Tensor = gradient.unflatten(1, (heads, -1)).sum(dim=2)
    return narrowed
