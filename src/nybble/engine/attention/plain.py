"""Attention in plain torch, and torch's flash attention for CPUs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from nybble.engine.attention.backend import BackendState, Gradients, Segments, narrowed, repeated

aten = torch.ops.aten


class PlainAttention:
    """Matrix products and a softmax in float32: the specification, and the last resort. Quadratic memory."""

    name = "plain torch"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
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
        saved: BackendState,
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
            for result, part, target in zip(results, parts, (rows, keys, keys), strict=True):
                result[target] = _rows(narrowed(part, result.shape[1])).to(result.dtype)
        return results  # type: ignore[return-value]


class FlashOnCpu:
    """torch's flash attention for CPUs: 0.5 to 0.7 of plain torch's time at 140 tokens, a fifth at 1,024.

    Always in float32: on a processor without bfloat16 instructions its backward took 4 to 6 times as long in bfloat16.
    """

    name = "flash on a CPU"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> tuple[torch.Tensor, BackendState]:
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        wide = repeated(query, key, value)
        logs = []
        for rows, keys, batch in _sequences(segments):
            q = _heads(query[rows].float(), batch)
            k, v = (_heads(part[keys].float(), batch) for part in wide)
            causal, mask = _masked(q, k, segments)
            out, log = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
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
        saved: BackendState,
        segments: Segments,
    ) -> Gradients:
        results = tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key, value))
        wide = repeated(query, key, value)
        for (rows, keys, batch), log in zip(_sequences(segments), saved, strict=True):
            do, q, o = (_heads(part[rows].float(), batch) for part in (gradient, query, out))
            k, v = (_heads(part[keys].float(), batch) for part in wide)
            causal, mask = _masked(q, k, segments)
            parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, log, 0.0, causal, attn_mask=mask
            )
            for result, part, target in zip(results, parts, (rows, keys, keys), strict=True):
                result[target] = _rows(narrowed(part, result.shape[1])).to(result.dtype)
        return results  # type: ignore[return-value]


def _sequences(segments: Segments) -> Iterator[tuple[slice, slice, int]]:
    """Rows of queries and keys that can be computed at once, and how many sequences of equal length they contain."""
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
    return scores.masked_fill_(_future(query, key), float("-inf")) if segments.causal else scores


def _masked(query: torch.Tensor, key: torch.Tensor, segments: Segments) -> tuple[bool, torch.Tensor | None]:
    """Whether flash on a CPU masks by itself, from the top left; if that would be wrong, what is added to the scores."""
    if not segments.causal or query.shape[-2] == key.shape[-2]:
        return segments.causal, None
    future = _future(query, key)
    return False, torch.zeros(future.shape, dtype=query.dtype).masked_fill_(future, float("-inf"))


def _future(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The keys that causal queries do not see, (queries, keys): the last query sees all."""
    queries, keys = query.shape[-2], key.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1 + keys - queries)


def _widened(part: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated for the query heads that share them."""
    return part.repeat_interleave(query.shape[1] // part.shape[1], dim=1)
