"""16-bit weights in the CUDA step: products of cuBLAS, in the form that the kernels after them read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels.cuda.buffers import SharedBuffers
from nybble.kernels.cuda.kernels import ProductOutput, Squares


class PlainWeights:
    """Projections that share an input, and the adapters' A.

    Args:
        weights: (outputs, inputs) bf16 each.
        below: A of all adapters, (ranks, inputs) bf16, or None.
    """

    def __init__(self, weights: Sequence[torch.Tensor], below: torch.Tensor | None) -> None:
        self._weights, self._below = weights, below
        self.inputs = int(weights[0].shape[1])
        self.outputs = sum(len(weight) for weight in weights)
        self.ranks = 0 if below is None else len(below)

    def output(self, name: str, rows: int, buffers: SharedBuffers) -> ProductOutput:
        """Buffers for a product's output."""
        parts = buffers.take(f"{name} parts", 1, rows, self.outputs)
        return ProductOutput(parts, buffers.take(f"{name} ranks", 1, rows, self.ranks))

    def product(self, x_mk: torch.Tensor, squares: Squares | None, out: ProductOutput) -> None:
        """x W^T, and x A^T; as `Kernels.product`."""
        split = out.parts[0].split([len(weight) for weight in self._weights], 1)
        for weight, part in zip(self._weights, split, strict=True):
            part.copy_(torch.mm(x_mk, weight.t(), out_dtype=torch.float32))
        if self._below is not None:
            torch.mm(x_mk, self._below.t(), out_dtype=torch.float32, out=out.ranks[0])
        if squares is not None:
            factor = squares.factor(self.inputs)
            out.parts[0].mul_(factor)
            out.ranks[0].mul_(factor)
