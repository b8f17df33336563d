"""Causal attention, forward and backward apart, so that a layer may keep its result and recompute its inputs.

Every backend takes rows of tokens: query (tokens, heads, head size), key and value (tokens, key-value heads, head size),
strided as they come out of the fused projection, and gives out (tokens, heads, head size).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

aten = torch.ops.aten
Saved = tuple[Any, ...]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
UNMASKED, CAUSAL_FROM_TOP_LEFT = 0, 1  # custom_mask_type of the memory-efficient kernels


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
    ) -> tuple[torch.Tensor, Saved]:
        """The result, and what backward needs beside it (the log of the softmax's sum; random states)."""

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        """Gradients of query, key and value, in their shapes."""


class Plain:
    """Matrix products and a softmax in float32: the specification, and the last resort. Quadratic memory."""

    name = "plain torch"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, Saved]:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        logs = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        for rows, keys, batch in _sequences(segments):
            q = _heads(query[rows].float(), batch)
            k, v = (_heads(part[keys].float(), batch) for part in (key, value))
            scores = _scores(q, k, segments)
            log = scores.logsumexp(dim=-1)
            weights = torch.exp(scores - log[..., None])
            out[rows] = _rows(weights @ _widened(v, q)).to(out.dtype)
            logs[rows] = log.transpose(1, 2).reshape(-1, log.shape[1])
        return out, (logs,)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        results = tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key, value))
        for rows, keys, batch in _sequences(segments):
            q, o, do = (_heads(part[rows].float(), batch) for part in (query, out, gradient))
            k, v = (_heads(part[keys].float(), batch) for part in (key, value))
            log = _heads(saved[0][rows, :, None], batch)
            weights = torch.exp(_scores(q, k, segments) - log)
            inner = weights * (do @ _widened(v, q).transpose(-1, -2) - (do * o).sum(dim=-1, keepdim=True))
            inner = inner / math.sqrt(q.shape[-1])
            parts = (inner @ _widened(k, q), inner.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ do)
            for result, part, place in zip(results, parts, (rows, keys, keys), strict=True):
                result[place] = _rows(_narrowed(part, result.shape[1])).to(result.dtype)
        return results  # type: ignore[return-value]


class OnCpu:
    """torch's flash attention for CPUs: 0.5 to 0.7 of plain torch's time at 140 tokens, a fifth at 1,024.

    In float32 whatever comes: on a processor without bfloat16 instructions its backward took 4 to 6 times as long in bfloat16.
    """

    name = "flash on a CPU"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, Saved]:
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        wide = _repeated(query, key, value)
        logs, causal = [], segments.seen is None
        for rows, keys, batch in _sequences(segments):
            q = _heads(query[rows].float(), batch)
            k, v = (_heads(part[keys].float(), batch) for part in wide)
            out, log = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
            result[rows] = _rows(out).to(result.dtype)
            logs.append(log)
        return result, tuple(logs)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        results = tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key, value))
        wide, causal = _repeated(query, key, value), segments.seen is None
        for (rows, keys, batch), log in zip(_sequences(segments), saved, strict=True):
            do, q, o = (_heads(part[rows].float(), batch) for part in (gradient, query, out))
            k, v = (_heads(part[keys].float(), batch) for part in wide)
            parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, log, 0.0, causal)
            for result, part, place in zip(results, parts, (rows, keys, keys), strict=True):
                result[place] = _rows(_narrowed(part, result.shape[1])).to(result.dtype)
        return results  # type: ignore[return-value]


class Cudnn:
    """cuDNN's fused attention for sequences of equal length: 1.7 times flash on Hopper (docs/benchmarks.md)."""

    name = "cuDNN"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, Saved]:
        q, k, v = (_batched(part, segments).transpose(1, 2) for part in (query, key, value))
        out, log, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
        return out.transpose(1, 2).flatten(0, 1), (log, seed, offset)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        do, q, k, v, o = (_batched(part, segments).transpose(1, 2) for part in (gradient, query, key, value, out))
        log, seed, offset = saved
        length = segments.length
        results = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, log, seed, offset, None, None, None, length, length, 0.0, True
        )
        return tuple(part.transpose(1, 2).flatten(0, 1) for part in results)


class Flash:
    """FlashAttention 2 (Dao 2023) as torch brings it; packed sequences without padding."""

    name = "flash"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, Saved]:
        q, k, v = (_batched(part, segments) for part in (query, key, value))
        causal = segments.seen is None
        out, log, state, other, _ = aten._flash_attention_forward(q, k, v, *_bounds(segments), 0.0, causal, False)
        return out if segments.bounds is not None else out.flatten(0, 1), (log, state, other)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        do, q, k, v, o = (_batched(part, segments) for part in (gradient, query, key, value, out))
        log, state, other = saved
        causal = segments.seen is None
        results = aten._flash_attention_backward(do, q, k, v, o, log, *_bounds(segments), 0.0, causal, state, other)
        return tuple(part if segments.bounds is not None else part.flatten(0, 1) for part in results)


class Efficient:
    """The memory-efficient kernels, for cards before Ampere (T4, RTX 20), which flash does not know."""

    name = "memory-efficient"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, Saved]:
        q, k, v = (_batched(part, segments) for part in (query, *_repeated(query, key, value)))
        if segments.bounds is not None:
            q, k, v = q[None], k[None], v[None]
        out, log, seed, offset, *_ = aten._efficient_attention_forward(
            q, k, v, None, *_longest(segments), 0.0, _mask_type(segments), True
        )
        return out.flatten(0, 1), (log, seed, offset)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        saved: Saved,
        segments: Segments,
    ) -> Gradients:
        wide = (gradient, query, *_repeated(query, key, value), out)
        do, q, k, v, o = (_batched(part, segments) for part in wide)
        if segments.bounds is not None:
            do, q, k, v, o = do[None], q[None], k[None], v[None], o[None]
        log, seed, offset = saved
        results = aten._efficient_attention_backward(
            do, q, k, v, None, o, *_bounds(segments), log, 0.0, seed, offset, _mask_type(segments), False
        )[:3]
        dq, dk, dv = (part.flatten(0, 1) for part in results)
        return dq, _narrowed(dk, key.shape[1]), _narrowed(dv, key.shape[1])


@dataclass(frozen=True)
class Choice:
    """The backends of a model, and why."""

    equal: Backend
    packed: Backend
    reason: str

    def of(self, segments: Segments) -> Backend:
        """The backend for a batch."""
        return self.equal if segments.bounds is None else self.packed


def choose(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int) -> Choice:
    """The fastest backends that compute these heads on this device, found by trying them on a small batch."""
    if device.type == "cpu":
        return Choice(OnCpu(), OnCpu(), OnCpu.name)
    if device.type != "cuda" or dtype == torch.float32:
        return Choice(Plain(), Plain(), f"no fused attention for {device.type if device.type != 'cuda' else 'float32'}")
    refused: list[str] = []
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    sizes = (heads, key_heads, head_size)
    equal = _first([*([Cudnn()] if hopper else []), Flash(), Efficient()], device, dtype, sizes, False, refused)
    packed = _first([Flash(), Efficient()], device, dtype, sizes, True, refused)
    names = equal.name if equal.name == packed.name else f"{equal.name}, {packed.name} for packed rows"
    return Choice(equal, packed, "; ".join([names, *dict.fromkeys(refused)]))


def _first(
    backends: list[Backend],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    packed: bool,
    refused: list[str],
) -> Backend:
    heads, key_heads, head_size = sizes
    bounds = torch.tensor([0, 16, 64], dtype=torch.int32, device=device) if packed else None
    segments = Segments(1, 64, bounds, 48)
    query = torch.zeros(64, heads, head_size, dtype=dtype, device=device)
    key = torch.zeros(64, key_heads, head_size, dtype=dtype, device=device)
    for backend in backends:
        try:
            out, saved = backend.forward(query, key, key, segments)
            backend.backward(out, query, key, key, out, saved, segments)
        except RuntimeError as error:
            refused.append(f"{backend.name} refused: {str(error).splitlines()[0]}")
            continue
        return backend
    refused.append("using plain torch, with memory quadratic in the length")
    return Plain()


def _batched(part: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Rows as (batch, length, heads, head size), or as they are where they are packed."""
    return part if segments.bounds is not None else part.unflatten(0, (segments.batch, segments.length))


def _bounds(segments: Segments) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Of queries and keys, and the longest of each."""
    keys = segments.keys
    if segments.bounds is None:
        return None, None, segments.length, keys.length
    return segments.bounds, keys.bounds, segments.longest, keys.longest


def _longest(segments: Segments) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None, int | None]:
    return _bounds(segments) if segments.bounds is not None else (None, None, None, None)


def _mask_type(segments: Segments) -> int:
    return CAUSAL_FROM_TOP_LEFT if segments.seen is None else UNMASKED


def _repeated(query: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in parts)


def _sequences(segments: Segments) -> Iterator[tuple[slice, slice, int]]:
    """Rows of queries and keys that can be computed at once, and how many sequences of equal length they hold."""
    if segments.bounds is None:
        everything = slice(0, segments.tokens)
        yield everything, everything, segments.batch
        return
    assert segments.keys.bounds is not None
    bounds = (segments.bounds.tolist(), segments.keys.bounds.tolist())
    for rows, keys in zip(*map(itertools.pairwise, bounds), strict=True):
        yield slice(*rows), slice(*keys), 1


def _heads(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """(batch, heads, length, head size)"""
    heads: torch.Tensor = rows.unflatten(0, (batch, -1)).transpose(1, 2)
    return heads


def _rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(0, 1)


def _scores(query: torch.Tensor, key: torch.Tensor, segments: Segments) -> torch.Tensor:
    scores = query @ _widened(key, query).transpose(-1, -2) / math.sqrt(query.shape[-1])
    if segments.seen is not None:
        return scores
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill_(future, float("-inf"))


def _widened(part: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated for the query heads that share them."""
    return part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)


def _narrowed(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient of so many heads: the sum over the query heads that share each."""
    if gradient.shape[1] == heads:
        return gradient
    narrowed: torch.Tensor = gradient.unflatten(1, (heads, -1)).sum(dim=2)
    return narrowed
