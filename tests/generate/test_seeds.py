"""The seed contract's numbers against the vectors that its authors published, and as numbers of a uniform distribution."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.generate.seeds import fresh_seed, philox, uniforms

# Random123's kat_vectors, philox4x32 10: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
PINNED = [0.39904647231489565, 0.736633023410186, 0.23258560411269502, 0.09685010908048153]
SEEDS = st.integers(-(2**70), 2**70)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    def columns(words):
        return tuple(numpy.array([word, 0], dtype=numpy.uint64) for word in words)

    words = philox(columns(counter), columns(key))
    assert [int(word[0]) for word in words] == expected
    assert [int(word[1]) for word in words] == KNOWN[0][2]  # the row beside it


@given(st.lists(st.tuples(SEEDS, st.integers(0, 2**40)), min_size=1, max_size=8))
def test_a_number_is_a_function_of_seed_and_position_alone(asked):
    seeds, positions = zip(*asked, strict=True)
    together = uniforms(seeds, positions)
    assert together.dtype == numpy.float64
    for number, (seed, position) in enumerate(asked):
        (alone,) = uniforms([seed], [position])
        assert together[number] == alone
        assert 0 <= alone < 1
        assert uniforms([seed + 2**64], [position])[0] == alone


def test_numbers_are_those_of_earlier_releases():
    """A seed that a user noted gives the same answer again."""
    drawn = uniforms([0, 7, 2**64 - 1, -5], [0, 100, 2**33 + 1, 12])
    assert drawn.tolist() == PINNED


def test_draws_are_uniform_over_positions_and_over_seeds():
    count, bins = 50_000, 100
    fixed = [7] * count
    for seeds, positions in ((fixed, range(count)), (range(count), fixed)):
        drawn = uniforms(seeds, positions)
        found = numpy.histogram(drawn, bins, (0, 1))[0]
        chi_square = float(((found - count / bins) ** 2 / (count / bins)).sum())
        assert chi_square < bins - 1 + 4 * math.sqrt(2 * (bins - 1)), chi_square  # four standard deviations
        assert abs(float(numpy.corrcoef(drawn[1:], drawn[:-1])[0, 1])) < 4 / math.sqrt(count)


def test_requests_without_a_seed_get_one_each():
    assert len({fresh_seed() for _ in range(100)}) == 100
