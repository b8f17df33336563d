"""The random numbers of the seed contract: one uniform number per (seed, position), whatever else is in the batch.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a counter and a key, without
any state. The key is the seed, modulo 2^64; the counter's first two words are the token's position in the sequence, prompt
included; the other two are zero, reserved for further numbers. It is computed on the host, which knows seeds and positions: as
torch operations on a GPU the ten rounds were a fifth of a step of one row.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy
import numpy.typing

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
WORD = numpy.uint64(0xFFFFFFFF)  # 32 bits
HALF = numpy.uint64(32)
Words = numpy.typing.NDArray[numpy.uint64]
"""(rows,) of 32 bits each, so that a product of two is exact."""


def fresh_seed() -> int:
    """A seed for a request that has none."""
    return secrets.randbits(64)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> numpy.typing.NDArray[numpy.float64]:
    """One number in [0, 1) per row, (rows,), in steps of 2^-53.

    Args:
        seeds: any integers, modulo 2^64.
        positions: the position in its sequence of the token to be sampled.
    """
    keys = numpy.array([seed % 2**64 for seed in seeds], dtype=numpy.uint64)
    places = numpy.array(positions, dtype=numpy.uint64)
    zero = numpy.zeros_like(places)
    words = philox((places & WORD, places >> HALF, zero, zero), (keys & WORD, keys >> HALF))
    numbers: numpy.typing.NDArray[numpy.float64] = (words[0] >> numpy.uint64(5)) * 2.0**26 + (
        words[1] >> numpy.uint64(6)
    )
    return numbers * 2.0**-53


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox 4x32-10: four words from four words of counter and two of key."""
    first, second, third, fourth = counter
    low_key, high_key = key
    for _ in range(ROUNDS):
        one, other = first * numpy.uint64(MULTIPLIERS[0]), third * numpy.uint64(MULTIPLIERS[1])
        first, second = (other >> HALF) ^ second ^ low_key, other & WORD
        third, fourth = (one >> HALF) ^ fourth ^ high_key, one & WORD
        low_key, high_key = (low_key + numpy.uint64(WEYL[0])) & WORD, (high_key + numpy.uint64(WEYL[1])) & WORD
    return first, second, third, fourth
