"""Rows in e4m3, each with a scale, in plain torch: the specification of what fp8 matrix units are given.

e4m3 has a sign, four bits of exponent and three of mantissa: magnitudes from 2^-9 to 448, normal ones from 2^-6, and a relative
error of 2^-4 at most. A row's scale is the power of two that brings its largest magnitude into [128, 256): multiplying by it
is exact, and a scale in between would not make the numbers more precise, for they have exponents of their own.
"""

from __future__ import annotations

import dataclasses

import torch

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # matrix units take rows of a multiple of this many numbers
FEWEST, INFINITE = 27, 255
"""Exponents of float32, biased: the smallest that a row's largest magnitude counts as, so that rows of zeros have a scale
(2^-107), and that of infinity and of what is not a number."""
LEFT_MOST, RIGHT_MOST, RANGE = 5, 7, 40
"""Exponents: of the left operand's usual numbers, of the right one's largest, and r itself."""
SPARE = 7  # powers of two that a row's largest magnitude keeps, of the 8 that e4m3 has above 1


@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Rows as an operation computed them, and in e4m3."""

    wide: torch.Tensor
    """(m, k) view: the numbers in the type of the activations."""
    values: torch.Tensor
    """(m, k or more), e4m3: the numbers over their row's scale. What is to the right of them is not written with them."""
    scales: torch.Tensor
    """(m, 1) float32."""


def write(out: torch.Tensor | ScaledRows, numbers: torch.Tensor) -> None:
    """Write an operation's result into its target."""
    if isinstance(out, ScaledRows):
        out.wide.copy_(numbers)
        quantize_rows(out)
    else:
        out.copy_(numbers)


def quantize_rows(rows: ScaledRows) -> None:
    """Fill values and scales from the wide numbers. A row with a number that is not finite becomes all NaN, other rows do not."""
    wide = rows.wide.float()
    largest = magnitudes(wide).amax(dim=1, keepdim=True) >> 23
    exponent = largest.clamp(min=FEWEST)
    nan = torch.full((), float("nan"), device=wide.device)
    is_finite = largest < INFINITE
    rows.scales.copy_(torch.where(is_finite, _power(exponent - SPARE), nan))
    inverse = torch.where(is_finite, _power(254 + SPARE - exponent), nan)
    rows.values[:, : wide.shape[1]] = (wide * inverse).to(E4M3)


def magnitudes(numbers: torch.Tensor) -> torch.Tensor:
    """Bits of the magnitudes of float32: ordered like these, with what is not a number last."""
    return numbers.view(torch.int32) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Balance:
    """How a product of ranks, T (s B)^T, is divided between its two operands, each of which is split into pairs of e4m3.

    The sums of a row have the scale of x over the factor of W, and e4m3's steps end at 2^-9, so a small adapter would be lost in
    one operand while the other has room. T is multiplied by a power of two and s B divided by it, so that both are about equally
    large: 2^r with r = (right - left) / 2. right is the exponent of the largest s B times W's factor. left is that of T over its
    row's scale where the row is even, and T so as large as it gets: T is about the root mean square of x, a seventh of 180 times
    the row's scale, times sqrt(k) times the largest A. In backward A^T takes the place of s B, and s B that of A.
    """

    largest: torch.Tensor
    """(2,) int32: bits of the largest magnitude of s B and of A."""
    own: int
    """Which of them the right operand consists of."""
    factor: int
    """Exponent of what W is multiplied with."""
    typical: int
    """Exponent of 180 sqrt(k) / 7."""


def rank_exponent(balance: Balance) -> torch.Tensor:
    """r, () int32."""
    exponents = (balance.largest >> 23) - 127
    right, left = exponents[balance.own] + balance.factor, exponents[1 - balance.own] + balance.typical
    balanced = ((right - left) >> 1).minimum(LEFT_MOST - left)  # a T of seven times the usual one saturates
    return balanced.maximum(right - RIGHT_MOST).clamp(-RANGE, RANGE)  # s B never does


def split(source_mr: torch.Tensor, balance: Balance, scales_m1: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write an operand of a product of ranks as pairs of e4m3: numbers rounded, and what the rounding left.

    With the left operand as [high | high | low] and the right one as [high | low | high], a product of these columns is
    high high + high low + low high: only low low is missing, a 256th of the rest.

    Args:
        source_mr: the numbers, of any strides.
        balance: what they are multiplied with.
        scales_m1: of the rows that they stand beside, if this is the left operand; None for the right one.
        out: (m, 3 r or more) e4m3 view; columns beyond 3 r are zeroed. Magnitudes over 448 become 448.
    """
    numbers, ranks, exponent = source_mr.float(), source_mr.shape[1], rank_exponent(balance)
    power = exponent if scales_m1 is not None else balance.factor - exponent
    numbers = numbers * _power(power + 127)
    if scales_m1 is not None:
        numbers = numbers / scales_m1
    numbers = numbers.clamp(-448, 448)
    high = numbers.to(E4M3)
    low = (numbers - high.float()).to(E4M3)
    parts = (high, low, high) if scales_m1 is None else (high, high, low)
    for index, part in enumerate(parts):
        out[:, index * ranks : (index + 1) * ranks] = part
    out.view(torch.uint8)[:, 3 * ranks :] = 0


def scaled_product(
    left_mk: torch.Tensor,
    left_scales: torch.Tensor,
    right_nk: torch.Tensor,
    right_scales: torch.Tensor,
    fast: bool,
    out_mn: torch.Tensor,
) -> None:
    """Product of two matrices in e4m3 whose rows have scales: left right^T, summed in float32.

    Args:
        left_mk: contiguous; k is a multiple of `MULTIPLE`.
        left_scales: (m, 1) float32.
        right_nk: contiguous; n is a multiple of `MULTIPLE`.
        right_scales: (1, n) float32.
        fast: whether the matrix units may sum in their own registers, with fewer bits than float32 has; faster on Hopper.
        out_mn: contiguous, bfloat16 (here: of any type).
    """
    out_mn.copy_(torch.mm(left_mk.float(), right_nk.float().t()) * left_scales * right_scales)


def _power(biased: torch.Tensor) -> torch.Tensor:
    """The power of two with a biased exponent (int32)."""
    return (biased << 23).view(torch.float32)
