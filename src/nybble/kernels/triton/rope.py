"""Rotary positions in place, and the backward, which also writes the gradients of query, key and value side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.kernels.scaled import ScaledRows
from nybble.kernels.triton.launch import Launcher, power_of_two
from nybble.kernels.triton.scaled import magnitudes, parts_of, scale_of


@triton.jit
def _forward(
    qkv, cosine, sine, stride, positions, first, heads,
    HEAD: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    low = tl.arange(0, HALF)[None, :]
    inside = low < HEAD // 2
    table = ((first + row) % positions) * HEAD + low
    cosine_low = tl.load(cosine + table, mask=inside, other=0.0).to(tl.float32)
    cosine_high = tl.load(cosine + table + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    sine_low = tl.load(sine + table, mask=inside, other=0.0).to(tl.float32)
    sine_high = tl.load(sine + table + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[:, None]
        address = qkv + row.to(tl.int64) * stride + head * HEAD + low
        mask = inside & (head < heads)
        a = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(address + HEAD // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(address, (a * cosine_low - b * sine_low).to(qkv.dtype.element_ty), mask=mask)
        tl.store(address + HEAD // 2, (b * cosine_high + a * sine_high).to(qkv.dtype.element_ty), mask=mask)


@triton.jit
def _rotated_back(
    query, key, value, head, low, inside, cosine_low, cosine_high, sine_low, sine_high, query_heads, key_heads,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Both halves of one row's heads: query and key rotated back, value as it is, zero beyond."""
    is_query = head < query_heads
    is_key = (head >= query_heads) & (head < query_heads + key_heads)
    is_value = (head >= query_heads + key_heads) & (head < query_heads + 2 * key_heads)
    from_query = query + head * HEAD + low
    from_key = key + (head - query_heads) * HEAD + low
    from_value = value + (head - query_heads - key_heads) * HEAD + low
    a = tl.load(from_query, mask=inside & is_query, other=0.0).to(tl.float32)
    b = tl.load(from_query + HEAD // 2, mask=inside & is_query, other=0.0).to(tl.float32)
    a += tl.load(from_key, mask=inside & is_key, other=0.0).to(tl.float32)
    b += tl.load(from_key + HEAD // 2, mask=inside & is_key, other=0.0).to(tl.float32)
    plain_a = tl.load(from_value, mask=inside & is_value, other=0.0).to(tl.float32)
    plain_b = tl.load(from_value + HEAD // 2, mask=inside & is_value, other=0.0).to(tl.float32)
    return a * cosine_low + b * sine_high + plain_a, b * cosine_high - a * sine_low + plain_b


@triton.jit
def _backward(
    query, key, value, cosine, sine, out, values, scales, query_stride, key_stride, value_stride, out_stride,
    values_stride, positions, first, query_heads, key_heads,
    SCALED: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    query += wide * query_stride
    key += wide * key_stride
    value += wide * value_stride
    low = tl.arange(0, HALF)[None, :]
    inside = low < HEAD // 2
    table = ((first + row) % positions) * HEAD + low
    cosine_low = tl.load(cosine + table, mask=inside, other=0.0).to(tl.float32)
    cosine_high = tl.load(cosine + table + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    sine_low = tl.load(sine + table, mask=inside, other=0.0).to(tl.float32)
    sine_high = tl.load(sine + table + HEAD // 2, mask=inside, other=0.0).to(tl.float32)
    heads = query_heads + 2 * key_heads
    inverse = 1.0
    if SCALED:  # the row's largest magnitude comes first; the second reading comes from the cache
        largest = tl.zeros((HEADS, HALF), tl.int32)
        for start in range(0, heads, HEADS):
            head = (start + tl.arange(0, HEADS))[:, None]
            a, b = _rotated_back(query, key, value, head, low, inside, cosine_low, cosine_high, sine_low, sine_high,
                                 query_heads, key_heads, HEAD)  # fmt: skip
            largest = tl.maximum(largest, magnitudes(a.to(out.dtype.element_ty).to(tl.float32)))
            largest = tl.maximum(largest, magnitudes(b.to(out.dtype.element_ty).to(tl.float32)))
        scale, inverse = scale_of(tl.max(largest))
        tl.store(scales + row, scale)
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS))[:, None]
        a, b = _rotated_back(query, key, value, head, low, inside, cosine_low, cosine_high, sine_low, sine_high,
                             query_heads, key_heads, HEAD)  # fmt: skip
        a, b = a.to(out.dtype.element_ty), b.to(out.dtype.element_ty)
        mask = inside & (head < heads)
        address = out + wide * out_stride + head * HEAD + low
        tl.store(address, a, mask=mask)
        tl.store(address + HEAD // 2, b, mask=mask)
        if SCALED:
            address = values + wide * values_stride + head * HEAD + low
            tl.store(address, (a.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=mask)
            tl.store(address + HEAD // 2, (b.to(tl.float32) * inverse).to(values.dtype.element_ty), mask=mask)


_launch_forward, _launch_backward = Launcher(_forward, num_warps=4), Launcher(_backward, num_warps=4)


def rope(
    qkv_mn: torch.Tensor, cosine_pd: torch.Tensor, sine_pd: torch.Tensor, rotated_heads: int, head_size: int, first: int
) -> None:
    """See `reference.rope`."""
    half = power_of_two(head_size // 2)
    _launch_forward(
        (qkv_mn.shape[0],), qkv_mn, cosine_pd, sine_pd, qkv_mn.stride(0), cosine_pd.shape[0], first, rotated_heads,
        head_size, half, _heads(half),
    )  # fmt: skip


def rope_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cosine_pd: torch.Tensor,
    sine_pd: torch.Tensor,
    head_size: int,
    first: int,
    out_mn: torch.Tensor | ScaledRows,
) -> None:
    """See `reference.rope_backward`."""
    query, key, value = gradients
    half, out = power_of_two(head_size // 2), parts_of(out_mn)
    _launch_backward(
        (query.shape[0],), query, key, value, cosine_pd, sine_pd, *out.tensors,
        query.stride(0), key.stride(0), value.stride(0), *out.strides,
        cosine_pd.shape[0], first, query.shape[1] // head_size, key.shape[1] // head_size,
        out.is_scaled, head_size, half, _heads(half),
    )  # fmt: skip


def _heads(half: int) -> int:
    return max(1, 2048 // half)  # 16 pairs per thread
