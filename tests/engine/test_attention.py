"""Attention on a CPU against plain torch's, for equal and for packed rows of any lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.attention.backend import Segments
from nybble.engine.attention.choice import choose
from nybble.engine.attention.plain import FlashOnCpu, PlainAttention
from nybble.engine.padding import PaddedAttention, separate, spans_of

HEADS = [(4, 4, 16), (9, 3, 64), (8, 1, 20)]


def compare(segments: Segments, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[float]:
    """The largest difference of out and of the gradients of query, key and value, strided as a layer hands them over."""
    torch.manual_seed(0)
    qkv = torch.randn(segments.tokens, (heads + 2 * key_heads) * size, dtype=dtype)
    parts = qkv.view(segments.tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    change = torch.randn(segments.tokens, size, heads, dtype=dtype).transpose(1, 2)
    results = []
    for backend in (FlashOnCpu(), PlainAttention()):
        out, saved = backend.forward(*parts, segments)
        results.append((out, *backend.backward(change, *parts, out, saved, segments)))
    for mine, given_part in zip(results[0], (parts[0], *parts), strict=True):
        assert (mine.shape, mine.dtype) == (given_part.shape, given_part.dtype)
    return [(mine - wanted).abs().max().item() for mine, wanted in zip(*results, strict=True)]


@pytest.mark.parametrize("heads, key_heads, size", HEADS)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4))
@settings(max_examples=15)
def test_packed_rows(heads, key_heads, size, lengths):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    segments = Segments(1, sum(lengths), bounds, max(lengths))
    assert max(compare(segments, heads, key_heads, size, torch.float32)) < 2e-5


@pytest.mark.parametrize("heads, key_heads, size", HEADS)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 33), (2, 600)])
def test_equal_rows(heads, key_heads, size, batch, length):
    assert max(compare(Segments(batch, length), heads, key_heads, size, torch.float32)) < 2e-5


def test_sixteen_bits_are_computed_in_float32_and_rounded_once():
    torch.manual_seed(0)
    segments = Segments(2, 100)
    exact = [torch.randn(200, heads, 64).bfloat16().float() for heads in (9, 3, 3)]
    wanted, _ = FlashOnCpu().forward(*exact, segments)
    found, _ = FlashOnCpu().forward(*(part.bfloat16() for part in exact), segments)
    assert torch.equal(found, wanted.bfloat16())
    assert max(compare(segments, 9, 3, 64, torch.bfloat16)) <= 2**-5  # a last place of the largest gradient


def test_a_cpu_uses_it():
    choice = choose(torch.device("cpu"), torch.float32, 9, 3, 64)
    assert choice.reason == "flash on a CPU"
    assert choice.of(Segments(2, 8)).name == choice.of(Segments(1, 8, torch.tensor([0, 3, 8]), 5)).name == choice.reason


SPANS = [(0, 9), (3, 12), (12, 12), (0, 12), (5, 6)]


@pytest.mark.parametrize("heads, key_heads, size", HEADS)
@pytest.mark.parametrize("backend", [FlashOnCpu, PlainAttention])
@pytest.mark.parametrize("spans", [SPANS, [(0, 7), (0, 12)], [(4, 12)], [(12, 12)]])
def test_padded_rows_are_what_torch_gives_for_the_mask_of_transformers(heads, key_heads, size, backend, spans):
    torch.manual_seed(0)
    mask = torch.tensor([[begin <= place < end for place in range(12)] for begin, end in spans])
    assert spans_of(mask) == spans
    segments, padding = separate(spans, 12, mask.device)
    parts = [torch.randn(len(spans) * 12, count, size, requires_grad=True) for count in (heads, key_heads, key_heads)]
    change = torch.randn(len(spans) * 12, heads, size)
    q, k, v = (part.unflatten(0, (len(spans), 12)).transpose(1, 2) for part in parts)
    allowed = mask[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    wanted = wanted.transpose(1, 2).flatten(0, 1)
    wanted.backward(change)
    detached = [part.detach() for part in parts]
    padded = PaddedAttention(backend(), backend(), padding)
    out, saved = padded.forward(*detached, segments)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, part in zip(padded.backward(change, *detached, out, saved, segments), parts, strict=True):
        torch.testing.assert_close(ours, part.grad, rtol=1e-4, atol=1e-5)


def test_rows_without_padding_and_rows_with_holes():
    assert separate([(0, 5)] * 3, 5, torch.device("cpu")) == (Segments(3, 5), None)
    assert spans_of(torch.tensor([[1, 1, 0], [1, 0, 1]])) is None
    assert spans_of(torch.tensor([[1, 1, 0], [0, 0, 0]])) == [(0, 2), (3, 3)]
