"""Attention on a CPU against plain torch's, for equal and for packed rows of any lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.attention import OnCpu, Plain, Segments, choose

HEADS = [(4, 4, 16), (9, 3, 64), (8, 1, 20)]


def compare(segments: Segments, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[float]:
    """The largest difference of out and of the gradients of query, key and value, strided as a layer hands them over."""
    torch.manual_seed(0)
    qkv = torch.randn(segments.tokens, (heads + 2 * key_heads) * size, dtype=dtype)
    parts = qkv.view(segments.tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    change = torch.randn(segments.tokens, size, heads, dtype=dtype).transpose(1, 2)
    results = []
    for backend in (OnCpu(), Plain()):
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
    wanted, _ = OnCpu().forward(*exact, segments)
    found, _ = OnCpu().forward(*(part.bfloat16() for part in exact), segments)
    assert torch.equal(found, wanted.bfloat16())
    assert max(compare(segments, 9, 3, 64, torch.bfloat16)) <= 2**-5  # a last place of the largest gradient


def test_a_cpu_takes_it():
    choice = choose(torch.device("cpu"), torch.float32, 9, 3, 64)
    assert choice.reason == "flash on a CPU"
    assert choice.of(Segments(2, 8)).name == choice.of(Segments(1, 8, torch.tensor([0, 3, 8]), 5)).name == choice.reason
