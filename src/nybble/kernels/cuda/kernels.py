"""The decoder's kernels on one device, as functions of tensors."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nybble.kernels.cuda import arguments
from nybble.kernels.cuda.arguments import address
from nybble.kernels.cuda.buffers import SharedBuffers
from nybble.kernels.cuda.compile import cubin
from nybble.kernels.cuda.launch import DEPENDENT_FROM, CudaKernel, shared_limit
from nybble.kernels.cuda.layout import SLAB, attention_groups, attention_shares, product_layout
from nybble.kernels.reference import Nested

ELEMENTWISE_COLUMNS = 512  # of a block: 128 threads of four


@dataclass(frozen=True)
class QuantisedWeight:
    """One NF4 or FP4 weight in blocks of 64, as bitsandbytes holds it."""

    codes: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    nested: Nested | None
    rows: int


class ProductWeights:
    """Projections that share an input, and rows in bf16 below them (the adapters' A).

    Args:
        weights: at most three, of one table of codes and one of scales.
        below: (16 x n, inputs) bf16, or None.
        inputs: a multiple of 64.
    """

    def __init__(self, weights: Sequence[QuantisedWeight], below: torch.Tensor | None, inputs: int) -> None:
        self.inputs, self.blocks = inputs, inputs // 64
        self.outputs = sum(weight.rows for weight in weights)
        self.ranks = 0 if below is None else len(below)
        self._kept = (weights, below)  # the structure has addresses only
        first = weights[0]
        fields = arguments.ProductArguments(
            code=address(first.code), code2=address(first.nested.code if first.nested else None), below=address(below),
            below_slabs=0 if below is None else len(below) // SLAB, blocks=self.blocks,
        )  # fmt: skip
        column = slab = 0
        for index, weight in enumerate(weights):
            nested = weight.nested
            fields.weights[index] = arguments.Weight(
                address(weight.codes), address(weight.scales), address(nested.absmax if nested else None),
                address(nested.offset if nested else None), weight.rows, slab, column,
            )  # fmt: skip
            column, slab = column + weight.rows, slab + -(-weight.rows // SLAB)
        fields.quantised_slabs = slab
        self.fields, self.count, self.nested = fields, len(weights), first.nested is not None
        self.whole_slabs = all(weight.rows % SLAB == 0 for weight in weights)


@dataclass(frozen=True)
class Squares:
    """Sums of squares of the rows of a residual stream, and the norm's epsilon."""

    sums: torch.Tensor
    """(parts, m) float32"""
    eps: float

    def factor(self, width: int) -> torch.Tensor:
        """One over the root of each row's mean square, (m, 1)."""
        return torch.rsqrt(self.sums.sum(0).unsqueeze(1) / width + self.eps)


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a group of projections, and which of them each row has."""

    entries: Sequence[Sequence[arguments.Adapter]]
    """For each adapter, its part in each projection; of rank 0 where it does not change one. At most MAX_ADAPTERS."""
    rows: torch.Tensor
    """(m,) int32, -1 for the base"""


class Kernels:
    """Compiled on first use, kept for the process.

    Args:
        device: a CUDA device of compute capability 8.0 or later.
        folder: where machine code is kept; None to keep none.
    """

    def __init__(self, device: torch.device, folder: pathlib.Path | None) -> None:
        facts = torch.cuda.get_device_properties(device)
        self.device, self.folder = device, folder
        self.multiprocessors = facts.multi_processor_count
        self.shared_limit = shared_limit(device)
        self.architecture = f"sm_{facts.major}{facts.minor}"
        self._dependent = 10 * facts.major + facts.minor >= DEPENDENT_FROM
        self._kernels: dict[tuple[str, str, tuple[tuple[str, int], ...]], CudaKernel] = {}

    def output(self, name: str, rows: int, weights: ProductWeights, buffers: SharedBuffers) -> ProductOutput:
        """Buffers for a product's output."""
        layout = product_layout(rows, weights.blocks, self.shared_limit)
        parts = buffers.take(f"{name} parts", layout.chunks, rows, weights.outputs)
        finer = layout.chunks * layout.warp_blocks
        return ProductOutput(parts, buffers.take(f"{name} ranks", finer, rows, weights.ranks))

    def product(self, x_mk: torch.Tensor, weights: ProductWeights, squares: Squares | None, out: ProductOutput) -> None:
        """x W^T in chunks of K.

        Args:
            x_mk: (m, inputs) bf16, 1 to 64 rows.
            weights: the projections.
            squares: divide each row by the root of its mean square; None to leave it.
            out: of `output`.
        """
        rows = len(x_mk)
        layout = product_layout(rows, weights.blocks, self.shared_limit)
        fields = arguments.ProductArguments.from_buffer_copy(weights.fields)
        fields.x, fields.y, fields.m, fields.columns = address(x_mk), address(out.parts), rows, out.parts.shape[2]
        fields.chunk_stride, fields.chunks, fields.chunk_blocks = (
            out.parts.stride(0),
            layout.chunks,
            layout.chunk_blocks,
        )
        fields.t = address(out.ranks)
        if squares is not None:
            fields.squares, fields.square_parts, fields.eps = address(squares.sums), len(squares.sums), squares.eps
        exact = weights.whole_slabs and weights.blocks % layout.warp_blocks == 0
        defines = {
            **layout.defines,
            "ADAPTERS": 0,
            "WEIGHTS": weights.count,
            "NESTED": int(weights.nested),
            "EXACT": int(exact),
        }
        kernel = self._kernel("product", "product", defines, layout.shared_bytes)
        wide = max(1, self.multiprocessors * layout.min_blocks // layout.chunks)
        kernel((min(wide, weights.fields.quantised_slabs) * layout.chunks, 1, 1), layout.threads, fields)

    def add_norm(
        self,
        residual_mh: torch.Tensor,
        output: ProductOutput | None,
        adapters: RowAdapters | None,
        weight_h: torch.Tensor,
        out_mh: torch.Tensor,
        squares: torch.Tensor,
    ) -> None:
        """Add a product's output to the residual stream, and weigh it for the product that follows.

        Args:
            residual_mh: float32, added to in place.
            output: of the product before, or None.
            adapters: of that product.
            weight_h: of the norm, float32.
            out_mh: bf16, residual times weight.
            squares: (ceil(h / 512), m) float32, the residual's.
        """
        rows, hidden = residual_mh.shape
        fields = arguments.AddNormArguments(
            address(residual_mh), *_parts(output), address(weight_h), address(out_mh), address(squares), hidden, rows,
        )  # fmt: skip
        _set_adapters(fields.adapters, adapters)
        self._kernel("elementwise", "add_norm", _adapter_define(adapters))(
            (-(-hidden // ELEMENTWISE_COLUMNS), rows, 1), 128, fields
        )

    def swiglu(self, output: ProductOutput, adapters: RowAdapters | None, out_mi: torch.Tensor) -> None:
        """silu(gate) x up of a product's output.

        Args:
            output: gate's outputs, then up's.
            adapters: of that product.
            out_mi: bf16.
        """
        rows, width = out_mi.shape
        fields = arguments.SwiGluArguments(*_parts(output), address(out_mi), width, rows)
        _set_adapters(fields.adapters, adapters)
        self._kernel("elementwise", "swiglu", _adapter_define(adapters))(
            (-(-width // ELEMENTWISE_COLUMNS), rows, 1), 128, fields
        )

    def attention(
        self,
        output: ProductOutput,
        adapters: RowAdapters | None,
        cache: CacheView,
        rotary: tuple[torch.Tensor, torch.Tensor],
        work: AttentionWork,
        out_mn: torch.Tensor,
        *,
        together: bool = False,
    ) -> None:
        """Rotate, append to the cache, attend; one token a row.

        Args:
            output: q, k and v of the product before.
            adapters: of that product.
            cache: pages of this layer and which of them the rows have.
            rotary: cosine and sine, (positions, head size / 2) float32.
            work: of `attention_work`.
            out_mn: (m, heads x head size) bf16.
            together: rows may be tokens of one sequence, which see those before them.
        """
        kv_heads, head_size = cache.keys.shape[1], cache.keys.shape[3]
        group = out_mn.shape[1] // head_size // kv_heads
        in_block, blocks = attention_groups(head_size, group)
        fields = arguments.AttentionArguments(
            *_parts(output), address(cache.positions), address(cache.pages),
            address(cache.keys), address(cache.values), address(rotary[0]), address(rotary[1]), address(out_mn),
            address(work.partial), address(work.counts), cache.pages.shape[1], kv_heads,
            head_size**-0.5 * math.log2(math.e),
        )  # fmt: skip
        _set_adapters(fields.adapters, adapters)
        defines = {
            "HEAD": head_size, "GROUP": in_block, "SUBGROUPS": blocks, "APPENDED": int(together),
            "FP8": int(cache.keys.dtype == torch.float8_e4m3fn), **_adapter_define(adapters),
        }  # fmt: skip
        if together:
            self._kernel("attention", "append", defines)((kv_heads, len(out_mn), 1), 128, fields)
        kernel = self._kernel("attention", "attention", defines)
        kernel((work.shares, kv_heads * blocks, len(out_mn)), 128, fields)

    def attention_work(
        self, rows: int, heads: int, kv_heads: int, head_size: int, buffers: SharedBuffers
    ) -> AttentionWork:
        """Buffers of `attention`, which the layers may share."""
        _, apart = attention_groups(head_size, heads // kv_heads)
        shares = attention_shares(rows, kv_heads * apart, self.multiprocessors)
        return AttentionWork(
            shares,
            buffers.take("attention", rows, heads, shares, head_size + 2),
            buffers.take("attention counts", rows, kv_heads * apart, dtype=torch.int32),
        )

    def _kernel(self, file: str, name: str, defines: Mapping[str, int], shared_bytes: int = 0) -> CudaKernel:
        key = (file, name, tuple(sorted(defines.items())))
        kernel = self._kernels.get(key)
        if kernel is None:
            code = cubin(file, self.architecture, defines, self.folder)
            kernel = CudaKernel(code, name, shared_bytes=shared_bytes, dependent=self._dependent)
            self._kernels[key] = kernel
        return kernel


@dataclass(frozen=True)
class ProductOutput:
    """What a product computes; the kernel after it adds the parts up, in their order, and B T to them."""

    parts: torch.Tensor
    """(chunks of K, m, outputs) float32"""
    ranks: torch.Tensor
    """(finer chunks of K, m, ranks) float32: T"""


@dataclass(frozen=True)
class CacheView:
    """One layer's pages, and the rows' share of them."""

    keys: torch.Tensor
    """(pages, kv heads, 64, head size) bf16 or e4m3"""
    values: torch.Tensor
    pages: torch.Tensor
    """(m, most pages of a row) int32"""
    positions: torch.Tensor
    """(m,) int32, of the token that is computed; -1 for a row that stands idle"""


@dataclass(frozen=True)
class AttentionWork:
    """Buffers for merging a row's shares."""

    shares: int
    partial: torch.Tensor
    counts: torch.Tensor


def _parts(output: ProductOutput | None) -> tuple[arguments.Parts, arguments.Parts]:
    if output is None:
        return arguments.Parts(), arguments.Parts()
    first, second = (
        arguments.Parts(address(part), len(part), part.shape[2], part.stride(0))
        for part in (output.parts, output.ranks)
    )
    return first, second


def _set_adapters(fields: Any, adapters: RowAdapters | None) -> None:
    if adapters is not None:
        fields.rows = address(adapters.rows)
        for index, entry in enumerate(each for row in adapters.entries for each in row):
            fields.table[index] = entry


def _adapter_define(adapters: RowAdapters | None) -> Mapping[str, int]:
    return {"ADAPTERS": 0 if adapters is None else min(2, len(adapters.entries))}
