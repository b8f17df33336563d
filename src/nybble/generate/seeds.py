"""The seed contract's numbers: one uniform draw per (seed, position), whatever else is computed beside it.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a counter and a key, without
a state that would have to be carried along. The key is the seed, modulo 2^64; the counter's first two words are the token's
position in the sequence, prompt included; the other two are zero, left for draws beside the first one. All of it is integer
arithmetic on tensors, without a look at their values, so a CUDA graph can capture it, and a kernel can do the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by from round to round
WORD = 0xFFFFFFFF  # 32 bits
Words = tuple[torch.Tensor, ...]


def fresh_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(64)


def seed_tensor(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Seeds, (rows,) int64: any integers, taken modulo 2^64."""
    unsigned = [seed % 2**64 for seed in seeds]
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in unsigned], device=device)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number of [0, 1) a row, (rows,) float64, in steps of 2^-53.

    Args:
        seeds: (rows,) int64, of `seed_tensor`.
        positions: (rows,) int64, where in its sequence the token that is drawn will stand.
    """
    zero = torch.zeros_like(positions)
    words = philox((positions & WORD, positions >> 32, zero, zero), (seeds & WORD, (seeds >> 32) & WORD))
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def philox(counter: Words, key: Words) -> Words:
    """Philox 4x32-10: four words of 32 bits, in int64 tensors of one shape, for four words of counter and two of key."""
    first, second, third, fourth = counter
    low_key, high_key = key
    for _ in range(ROUNDS):
        high, low = _product(first, MULTIPLIERS[0])
        other_high, other_low = _product(third, MULTIPLIERS[1])
        first, second = other_high ^ second ^ low_key, other_low
        third, fourth = high ^ fourth ^ high_key, low
        low_key, high_key = (low_key + WEYL[0]) & WORD, (high_key + WEYL[1]) & WORD
    return first, second, third, fourth


def _product(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low word of a 64-bit product, by halves of 16 bits: int64 would overflow."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
