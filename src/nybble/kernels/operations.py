"""The fused operations by name and signature, and which implementation a device gets, with the reason.

An implementation is a module with these functions: `reference` in plain torch, `triton` for CUDA. Another kind of kernels
would be another package beside `triton`, and may fall back on these for what it does not make faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nybble.kernels import reference
from nybble.kernels.reference import LowRank, Nested
from nybble.kernels.scaled import Balance, ScaledRows

try:
    from nybble.kernels import triton as kernels

    TRITON_MISSING = ""
except ImportError as error:  # torch for CPUs comes without Triton, and needs none
    TRITON_MISSING = str(error)


class Operations(Protocol):
    """The functions of `nybble.kernels.reference`, which specifies each of them."""

    def dequantize(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        blocksize: int,
        nested: Nested | None,
        out: torch.Tensor,
    ) -> None:
        """4-bit codes to numbers: `reference.dequantize`."""

    def dequantize_e4m3(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        code: torch.Tensor,
        blocksize: int,
        nested: Nested | None,
        factor: float,
        transposed: bool,
        out: torch.Tensor,
    ) -> None:
        """4-bit codes to e4m3: `reference.dequantize_e4m3`."""

    def pack_adapters(
        self,
        adapters: Sequence[LowRank],
        up_nr: torch.Tensor,
        down_rk: torch.Tensor,
        largest: torch.Tensor | None = None,
    ) -> None:
        """A group's adapters, cast and scaled: `reference.pack_adapters`."""

    def rms_norm(
        self, x_mh: torch.Tensor, weight_h: torch.Tensor, eps: float, out_mh: torch.Tensor | ScaledRows
    ) -> None:
        """Norm of each row: `reference.rms_norm`."""

    def add_rms_norm(
        self,
        x_mh: torch.Tensor,
        update_mh: torch.Tensor,
        weight_h: torch.Tensor,
        eps: float,
        sum_mh: torch.Tensor,
        out_mh: torch.Tensor | ScaledRows,
    ) -> None:
        """Residual add and norm: `reference.add_rms_norm`."""

    def rms_norm_backward(
        self,
        gradient_mh: torch.Tensor,
        x_mh: torch.Tensor,
        weight_h: torch.Tensor,
        eps: float,
        residual_mh: torch.Tensor | None,
        out_mh: torch.Tensor | ScaledRows,
    ) -> None:
        """Gradient through the norm, plus the residual's if there is one: `reference.rms_norm_backward`."""

    def rope(
        self,
        qkv_mn: torch.Tensor,
        cosine_pd: torch.Tensor,
        sine_pd: torch.Tensor,
        rotated_heads: int,
        head_size: int,
        first: int,
    ) -> None:
        """Rotary positions in place: `reference.rope`."""

    def rope_backward(
        self,
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cosine_pd: torch.Tensor,
        sine_pd: torch.Tensor,
        head_size: int,
        first: int,
        out_mn: torch.Tensor | ScaledRows,
    ) -> None:
        """Gradients of q, k, v rotated back, side by side: `reference.rope_backward`."""

    def swiglu(self, gate_up_mi: torch.Tensor, out_mi: torch.Tensor | ScaledRows) -> None:
        """silu(gate) x up: `reference.swiglu`."""

    def swiglu_backward(self, gradient_mi: torch.Tensor, gate_up_mi: torch.Tensor | ScaledRows) -> None:
        """Its gradients in place: `reference.swiglu_backward`."""

    def cross_entropy(self, logits_mv: torch.Tensor, targets_m: torch.Tensor, losses_m: torch.Tensor) -> None:
        """Losses, and gradients in place of the logits: `reference.cross_entropy`."""

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """A matrix product in float32: `reference.product`."""

    def quantize_rows(self, rows: ScaledRows) -> None:
        """Rows to e4m3: `reference.quantize_rows`."""

    def split(
        self, source_mr: torch.Tensor, balance: Balance, scales_m1: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Numbers as pairs of e4m3: `reference.split`."""

    def scaled_product(
        self,
        left_mk: torch.Tensor,
        left_scales: torch.Tensor,
        right_nk: torch.Tensor,
        right_scales: torch.Tensor,
        fast: bool,
        out_mn: torch.Tensor,
    ) -> None:
        """A product of rows in e4m3: `reference.scaled_product`."""


@dataclass(frozen=True)
class OperationsChoice:
    """Which implementation of the fused operations a device uses, and why."""

    operations: Operations
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


def choose(device: torch.device) -> OperationsChoice:
    """The operations for tensors on a device."""
    if device.type != "cuda":
        return OperationsChoice(reference, "plain torch", f"Triton's kernels do not run on {device.type}")
    if TRITON_MISSING:
        return OperationsChoice(reference, "plain torch", f"{TRITON_MISSING}; pip install triton")
    return OperationsChoice(kernels, "Triton kernels", "")
