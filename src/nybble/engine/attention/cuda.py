"""Attention on CUDA devices with the kernels that come with torch: cuDNN, FlashAttention 2, memory-efficient."""

from __future__ import annotations

import torch

from nybble.engine.attention.backend import BackendState, Gradients, Segments, narrowed, repeated

aten = torch.ops.aten
# custom_mask_type of the memory-efficient kernels; flash is always causal from the bottom right (torch.nn.attention.bias)
UNMASKED, CAUSAL_FROM_TOP_LEFT, CAUSAL_FROM_BOTTOM_RIGHT = range(3)


class Cudnn:
    """cuDNN's fused attention for sequences of equal length: 1.7 times flash on Hopper (docs/benchmarks.md)."""

    name = "cuDNN"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
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
        saved: BackendState,
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
    """torch's FlashAttention 2 (Dao 2023); packed sequences without padding."""

    name = "flash"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        q, k, v = (_batched(part, segments) for part in (query, key, value))
        out, log, state, other, _ = aten._flash_attention_forward(
            q, k, v, *_bounds(segments), 0.0, segments.causal, False
        )
        return out if segments.bounds is not None else out.flatten(0, 1), (log, state, other)

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
        do, q, k, v, o = (_batched(part, segments) for part in (gradient, query, key, value, out))
        log, state, other = saved
        results = aten._flash_attention_backward(
            do, q, k, v, o, log, *_bounds(segments), 0.0, segments.causal, state, other
        )
        return tuple(part if segments.bounds is not None else part.flatten(0, 1) for part in results)


class Efficient:
    """The memory-efficient kernels, for cards before Ampere (T4, RTX 20), which flash does not support."""

    name = "memory-efficient"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        q, k, v = (_batched(part, segments) for part in (query, *repeated(query, key, value)))
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
        saved: BackendState,
        segments: Segments,
    ) -> Gradients:
        wide = (gradient, query, *repeated(query, key, value), out)
        do, q, k, v, o = (_batched(part, segments) for part in wide)
        if segments.bounds is not None:
            do, q, k, v, o = do[None], q[None], k[None], v[None], o[None]
        log, seed, offset = saved
        results = aten._efficient_attention_backward(
            do, q, k, v, None, o, *_bounds(segments), log, 0.0, seed, offset, _mask_type(segments), False
        )[:3]
        dq, dk, dv = (part.flatten(0, 1) for part in results)
        return dq, narrowed(dk, key.shape[1]), narrowed(dv, key.shape[1])


def _batched(part: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Rows as (batch, length, heads, head size); packed rows stay as they are."""
    return part if segments.bounds is not None else part.unflatten(0, (segments.batch, segments.length))


def _bounds(segments: Segments) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """The bounds of queries and keys, and the longest sequence of each."""
    keys = segments.keys
    if segments.bounds is None:
        return None, None, segments.length, keys.length
    return segments.bounds, keys.bounds, segments.longest, keys.longest


def _longest(segments: Segments) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None, int | None]:
    return _bounds(segments) if segments.bounds is not None else (None, None, None, None)


def _mask_type(segments: Segments) -> int:
    if not segments.causal:
        return UNMASKED
    return CAUSAL_FROM_TOP_LEFT if segments.seen is None else CAUSAL_FROM_BOTTOM_RIGHT
