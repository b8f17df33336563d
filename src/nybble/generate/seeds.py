"""The random numbers of the seed contract: one uniform number per (seed, position), whatever else is in the batch.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a function of a counter and a key, without
any state. The key is the seed, modulo 2^64; the counter's first two words are the token's position in the sequence, prompt
included; the other two are zero, reserved for further numbers. All of it is integer arithmetic on tensors that never reads their
values on the host, so a CUDA graph can capture it, and a kernel can do the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
WORD = 0xFFFFFFFF  # 32 bits
Words = tuple[torch.Tensor, ...]


def fresh_seed() -> int:
    """A seed for a request that has none."""
    return secrets.randbits(64)


def seed_tensor(seeds: Sequence[int], device: torch.device) -> torch.Tensor:
    """Seeds as a tensor, (rows,) int64: any integers, modulo 2^64."""
    unsigned = [seed % 2**64 for seed in seeds]
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in unsigned], device=device)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per row, (rows,) float64, in steps of 2^-53.

    Args:
        seeds: (rows,) int64, from `seed_tensor`.
        positions: (rows,) int64, the position in its sequence of the token to be sampled.
    """
    zero = torch.zeros_like(positions)
    words = philox((positions & WORD, positions >> 32, zero, zero), (seeds & WORD, (seeds >> 32) & WORD))
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53


def philox(counter: Words, key: Words) -> Words:
    """Philox 4x32-10: four words of 32 bits, in int64 tensors of one shape, from four words of counter and two of key."""
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
    """The high and the low word of a 64-bit product, computed by halves of 16 bits, as int64 would overflow."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
