"""Every fused operation in plain torch: the specification, what CPUs run, and the oracle of the kernels' tests.

`nybble.kernels.triton` has the same names and signatures. Shape suffixes: m rows (tokens), h hidden, n outputs,
k inputs, i intermediate, v vocabulary, d head size. "View" means that the row stride
may exceed the row length. Arithmetic is float32 whatever the tensors' type, rounded once at the end. Where the target may be
`ScaledRows`, the rows are written in e4m3 too, from the rounded numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from nybble.kernels.scaled import E4M3, ScaledRows, magnitudes, write
from nybble.kernels.scaled import quantize_rows as quantize_rows
from nybble.kernels.scaled import scaled_product as scaled_product
from nybble.kernels.scaled import split as split


@dataclasses.dataclass(frozen=True)
class Nested:
    """Double quantisation (Dettmers et al. 2023, section 3): block scales stored in 8 bits with scales of their own."""

    code: torch.Tensor
    """(256,) float32: the value of each stored byte."""
    absmax: torch.Tensor
    """(super-blocks,) float32."""
    offset: torch.Tensor
    """() float32, added to every block scale."""
    blocksize: int


@dataclasses.dataclass(frozen=True)
class LowRank:
    """One adapter of a group of projections: which outputs it adds to, and which of the group's ranks it has."""

    a: torch.Tensor
    """(r, k)"""
    b: torch.Tensor
    """(outputs, r)"""
    scaling: float
    first_output: int
    first_rank: int


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    out: torch.Tensor,
) -> None:
    """4-bit codes to numbers, bit for bit equal to bitsandbytes'.

    Args:
        packed: bytes of two codes each, the high nibble first, row by row; any shape.
        absmax: (blocks,) block scales: float32, or uint8 where `nested` describes them.
        code: (16,) float32, the value of each code (NF4's or FP4's table).
        blocksize: weights per block; the row length is a multiple of it.
        nested: how the scales themselves are quantised.
        out: (n, k) view to fill.
    """
    rows, columns = out.shape
    scales = absmax
    if nested is not None:
        # Rounded before the offset is added, as bitsandbytes does: a fused multiply-add would differ in the last bit.
        wide = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        scales = nested.code[absmax.int()] * wide + nested.offset
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # the two values of each byte
    values = torch.nn.functional.embedding(packed.flatten().int(), pairs).view(-1, blocksize)
    out.copy_((values * scales[:, None]).view(rows, columns))


def dequantize_e4m3(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    nested: Nested | None,
    factor: float,
    transposed: bool,
    out: torch.Tensor,
) -> None:
    """4-bit codes to e4m3: what `dequantize` computes in float32, times a factor, rounded once.

    Args:
        packed: as for `dequantize`.
        absmax: likewise.
        code: likewise.
        blocksize: likewise.
        nested: likewise.
        factor: a power of two that brings the numbers into e4m3's range.
        transposed: whether to write the transpose.
        out: (n, k) view to fill; (k, n) for the transpose.
    """
    shape = out.shape[::-1] if transposed else out.shape
    numbers = torch.empty(shape, device=out.device)
    dequantize(packed, absmax, code, blocksize, nested, numbers)
    values = numbers.mul_(factor).to(E4M3)
    out.copy_(values.t() if transposed else values)


def pack_adapters(
    adapters: Sequence[LowRank], up_nr: torch.Tensor, down_rk: torch.Tensor, largest: torch.Tensor | None = None
) -> None:
    """Write the adapters of a group side by side, cast, and zero where an adapter does not add to an output.

    Args:
        adapters: at most three, their ranks one after another.
        up_nr: view for s B, as many columns as there are ranks, rounded up.
        down_rk: view for A.
        largest: (2,) int32, filled with the bits of the largest magnitudes of s B and of A as they were written.
    """
    up_nr.zero_()
    down_rk.zero_()
    for adapter in adapters:
        ranks = slice(adapter.first_rank, adapter.first_rank + adapter.a.shape[0])
        rows = slice(adapter.first_output, adapter.first_output + adapter.b.shape[0])
        up_nr[rows, ranks] = adapter.b.float() * adapter.scaling
        down_rk[ranks] = adapter.a
    if largest is not None:
        largest.copy_(torch.stack([magnitudes(up_nr.float()).amax(), magnitudes(down_rk.float()).amax()]))


def rms_norm(x_mh: torch.Tensor, weight_h: torch.Tensor, eps: float, out_mh: torch.Tensor | ScaledRows) -> None:
    """Root mean square norm (Zhang and Sennrich 2019) of each row, written into a view."""
    x = x_mh.float()
    write(out_mh, x * _inverse_rms(x, eps) * weight_h.float())


def add_rms_norm(
    x_mh: torch.Tensor,
    update_mh: torch.Tensor,
    weight_h: torch.Tensor,
    eps: float,
    sum_mh: torch.Tensor,
    out_mh: torch.Tensor | ScaledRows,
) -> None:
    """Write the residual stream plus an update into `sum_mh`, and its norm into `out_mh`."""
    torch.add(x_mh, update_mh, out=sum_mh)
    rms_norm(sum_mh, weight_h, eps, out_mh)


def rms_norm_backward(
    gradient_mh: torch.Tensor,
    x_mh: torch.Tensor,
    weight_h: torch.Tensor,
    eps: float,
    residual_mh: torch.Tensor | None,
    out_mh: torch.Tensor | ScaledRows,
) -> None:
    """Gradient of the norm's input, plus the residual's own if there is one, written into a view; the weight is frozen."""
    x = x_mh.float()
    inverse = _inverse_rms(x, eps)
    normed, inner = x * inverse, gradient_mh.float() * weight_h.float()
    mean = (inner * normed).mean(dim=-1, keepdim=True)
    result = inverse * (inner - normed * mean)
    write(out_mh, result if residual_mh is None else residual_mh.float() + result)


def rope(
    qkv_mn: torch.Tensor, cosine_pd: torch.Tensor, sine_pd: torch.Tensor, rotated_heads: int, head_size: int, first: int
) -> None:
    """Rotary positions (Su et al. 2021, in the halves of GPT-NeoX) on the first heads of each row, in place.

    Args:
        qkv_mn: rows of heads, the rotated ones (query and key) first; a view.
        cosine_pd: (positions, head size) table; row `first + m` modulo its length belongs to row m.
        sine_pd: the same for the sine.
        rotated_heads: how many heads to rotate.
        head_size: even.
        first: index of the first row in the batch.
    """
    rows = qkv_mn.shape[0]
    heads = qkv_mn[:, : rotated_heads * head_size].view(rows, rotated_heads, head_size)
    heads.copy_(_rotate(heads.float(), *_positions(cosine_pd, sine_pd, first, rows), transpose=False))


def rope_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cosine_pd: torch.Tensor,
    sine_pd: torch.Tensor,
    head_size: int,
    first: int,
    out_mn: torch.Tensor | ScaledRows,
) -> None:
    """Gradients of query, key and value, each (m, heads x head size), rotated back and written side by side into a view."""
    query, key, value = gradients
    rotated = torch.cat((query, key), dim=1)
    rows, width = rotated.shape
    heads = rotated.view(rows, width // head_size, head_size).float()
    back = _rotate(heads, *_positions(cosine_pd, sine_pd, first, rows), transpose=True)
    write(out_mn, torch.cat((back.view(rows, width), value.float()), dim=1))


def swiglu(gate_up_mi: torch.Tensor, out_mi: torch.Tensor | ScaledRows) -> None:
    """Write silu(gate) x up (Shazeer 2020) into a view; gate and up are side by side in each row."""
    gate, up = gate_up_mi.float().chunk(2, dim=-1)
    write(out_mi, torch.nn.functional.silu(gate) * up)


def swiglu_backward(gradient_mi: torch.Tensor, gate_up_mi: torch.Tensor | ScaledRows) -> None:
    """In place: gate and up become their gradients, and the gradient becomes silu(gate) x up, recomputed."""
    wide = gate_up_mi.wide if isinstance(gate_up_mi, ScaledRows) else gate_up_mi
    gate, up = wide.float().chunk(2, dim=-1)
    gradient, sigmoid = gradient_mi.float(), torch.sigmoid(gate)
    silu = gate * sigmoid
    activation = silu * up  # before gate and up are overwritten
    to_gate, to_up = gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * silu
    write(gate_up_mi, torch.cat((to_gate, to_up), dim=-1))
    gradient_mi.copy_(activation)


def cross_entropy(logits_mv: torch.Tensor, targets_m: torch.Tensor, losses_m: torch.Tensor) -> None:
    """Each row's cross-entropy in nats; the logits become their gradients, softmax minus one at the target.

    Args:
        logits_mv: overwritten.
        targets_m: int64; a row with a negative target is not counted: its loss and its gradients are zero.
        losses_m: float32, filled.
    """
    logits, counted = logits_mv.float(), targets_m >= 0
    index = targets_m.clamp(min=0)[:, None]
    logs = torch.log_softmax(logits, dim=-1)
    losses_m.copy_(torch.where(counted, -logs.gather(1, index)[:, 0], 0.0))
    gradients = logs.exp_()
    gradients.scatter_add_(1, index, torch.full_like(gradients[:, :1], -1.0))
    logits_mv.copy_(gradients * counted[:, None])


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix product of 16-bit tensors with a float32 result, for gradients that are summed."""
    return torch.mm(left.float(), right.float())


def _inverse_rms(x_mh: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x_mh.pow(2).mean(dim=-1, keepdim=True) + eps)


def _positions(
    cosine_pd: torch.Tensor, sine_pd: torch.Tensor, first: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    position = (first + torch.arange(rows, device=cosine_pd.device)) % cosine_pd.shape[0]
    return cosine_pd[position, None].float(), sine_pd[position, None].float()


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, transpose: bool) -> torch.Tensor:
    half = heads.shape[-1] // 2
    low, high = heads[..., :half], heads[..., half:]
    if transpose:
        weighed = heads * sine
        return heads * cosine + torch.cat((weighed[..., half:], -weighed[..., :half]), dim=-1)
    return heads * cosine + torch.cat((-high, low), dim=-1) * sine
