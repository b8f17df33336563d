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
    largest = (wide.view(torch.int32) & 0x7FFFFFFF).amax(dim=1, keepdim=True) >> 23
    exponent = largest.clamp(min=FEWEST)
    nan = torch.full((), float("nan"), device=wide.device)
    is_finite = largest < INFINITE
    rows.scales.copy_(torch.where(is_finite, _power(exponent - SPARE), nan))
    inverse = torch.where(is_finite, _power(254 + SPARE - exponent), nan)
    rows.values[:, : wide.shape[1]] = (wide * inverse).to(E4M3)


def split(
    source_mr: torch.Tensor, factor: float, scales_m1: torch.Tensor | None, is_right: bool, out: torch.Tensor
) -> None:
    """Write numbers as pairs of e4m3, a number rounded and what the rounding left, which together are as precise as bfloat16.

    With the left operand as [high | high | low] and the right one as [high | low | high], a product of these columns is
    high high + high low + low high: only low low is missing, a 256th of the rest.

    Args:
        source_mr: the numbers, of any strides.
        factor: what they are multiplied with; a power of two.
        scales_m1: what the rows are divided by, float32 powers of two; None for nothing.
        is_right: whether this is the right operand.
        out: (m, 3 r or more) e4m3 view; columns beyond 3 r are zeroed. Magnitudes over 448 become 448.
    """
    numbers, ranks = source_mr.float() * factor, source_mr.shape[1]
    if scales_m1 is not None:
        numbers = numbers / scales_m1
    numbers = numbers.clamp(-448, 448)
    high = numbers.to(E4M3)
    low = (numbers - high.float()).to(E4M3)
    parts = (high, low, high) if is_right else (high, high, low)
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
