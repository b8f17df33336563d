"""The fused operations in Triton; the same names and signatures as in `nybble.kernels.reference`."""

from __future__ import annotations

import torch

from nybble.kernels.triton.adapters import pack_adapters
from nybble.kernels.triton.cross_entropy import cross_entropy
from nybble.kernels.triton.dequantize import dequantize, dequantize_e4m3
from nybble.kernels.triton.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from nybble.kernels.triton.rope import rope, rope_backward
from nybble.kernels.triton.scaled import quantize_rows, scaled_product, split
from nybble.kernels.triton.swiglu import swiglu, swiglu_backward

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "dequantize",
    "dequantize_e4m3",
    "pack_adapters",
    "product",
    "quantize_rows",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_backward",
    "scaled_product",
    "split",
    "swiglu",
    "swiglu_backward",
]


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `reference.product`; cuBLAS accumulates in float32, so its result need not be rounded."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32)
