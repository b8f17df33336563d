"""One token for each of a fixed number of rows, in the CUDA kernels: eight launches a layer, nothing of it on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.packing import PackedGroup, pack_group
from nybble.generate.decoder.plain_weights import PlainWeights
from nybble.kernels.cuda.buffers import SharedBuffers
from nybble.kernels.cuda.kernels import (
    ELEMENTWISE_COLUMNS,
    CacheView,
    Kernels,
    ProductOutput,
    ProductWeights,
    RowAdapters,
    Squares,
)
from nybble.weights.watched import Ineligible

Product = tuple[ProductOutput, RowAdapters | None]


@dataclass(frozen=True)
class PackedModel:
    """A model as the kernels take it; its weights are the model's own."""

    model: DecoderModel
    layers: Sequence[Mapping[str, PackedGroup]]


def pack_model(model: DecoderModel) -> PackedModel:
    """All layers.

    Raises:
        Ineligible: a weight or an adapter that the kernels do not take.
    """
    if model.head.dtype != torch.bfloat16:
        raise Ineligible(f"the model's head is in {str(model.head.dtype).removeprefix('torch.')}, not bfloat16")
    if model.head_size % 16 or model.head_size > 256:
        raise Ineligible(f"heads of {model.head_size}; multiples of 16 up to 256 are supported")
    return PackedModel(
        model,
        [
            {name: pack_group(group, layer.adapters[name]) for name, group in layer.groups.items()}
            for layer in model.layers
        ],
    )


@dataclass(frozen=True)
class StepInput:
    """What a step reads, in buffers that stay where they are."""

    tokens: torch.Tensor
    """(m,) int64"""
    positions: torch.Tensor
    """(m,) int32, of these tokens; -1 for a row that stands idle"""
    pages: torch.Tensor
    """(m, most pages of a row) int32"""
    adapters: torch.Tensor
    """(m,) int32, -1 for the base"""


class CudaStep:
    """A step of `len(inputs.tokens)` rows.

    Args:
        packed: the model.
        kernels: of its device.
        inputs: buffers.
        cache: (layers, 2, pages, kv heads, 64, head size) bf16.
        rotary: cosine and sine, (positions, head size / 2) float32.
        buffers: shared with the steps of other sizes.
        together: rows may be tokens of one sequence.
    """

    def __init__(
        self,
        packed: PackedModel,
        kernels: Kernels,
        inputs: StepInput,
        cache: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        buffers: SharedBuffers,
        *,
        together: bool = False,
    ) -> None:
        model, rows = packed.model, len(inputs.tokens)
        self.packed, self.kernels, self.inputs, self.cache, self.rotary = packed, kernels, inputs, cache, rotary
        self.together = together
        first = packed.layers[0]
        hidden, bf16 = model.hidden, torch.bfloat16
        self.residual = buffers.take("residual", rows, hidden)
        self.normed = buffers.take("normed", rows, hidden, dtype=bf16)
        self.attended = buffers.take("attended", rows, model.heads * model.head_size, dtype=bf16)
        self.activated = buffers.take("activated", rows, first["down"].weights.inputs, dtype=bf16)
        self.squares = buffers.take("squares", -(-hidden // ELEMENTWISE_COLUMNS), rows)
        self.work = kernels.attention_work(rows, model.heads, model.kv_heads, model.head_size, buffers)
        self.logits = buffers.take("logits", rows, len(model.head))
        self.outputs: dict[tuple[str, type, int], ProductOutput] = {}
        for layer in packed.layers:
            for name, group in layer.items():
                key = _kind(name, group.weights)
                if key not in self.outputs:
                    self.outputs[key] = self._output(name, group.weights, buffers)

    def run(self) -> torch.Tensor:
        """Logits, (m, vocabulary) float32, the same buffer each time."""
        model, inputs = self.packed.model, self.inputs
        self.residual.copy_(model.embedding.index_select(0, inputs.tokens))
        product: Product | None = None
        for index, layer in enumerate(self.packed.layers):
            product = self._layer(index, layer, product)
        self._add_norm(product, model.norm)
        torch.mm(self.normed, model.head.t(), out=self.logits, out_dtype=torch.float32)
        return self.logits.mul_(Squares(self.squares, model.eps).factor(model.hidden))

    def _layer(self, index: int, layer: Mapping[str, PackedGroup], before: Product | None) -> Product:
        """One layer; gives the output of its last product, which is still to be added to the residual stream."""
        kernels, facts = self.kernels, self.packed.model.layers[index]
        self._add_norm(before, facts.norms[0])
        qkv = self._product(layer, "qkv", self.normed, Squares(self.squares, facts.eps[0]))
        view = CacheView(self.cache[index, 0], self.cache[index, 1], self.inputs.pages, self.inputs.positions)
        kernels.attention(*qkv, view, self.rotary, self.work, self.attended, together=self.together)
        self._add_norm(self._product(layer, "o", self.attended, None), facts.norms[1])
        gate_up = self._product(layer, "gate_up", self.normed, Squares(self.squares, facts.eps[1]))
        kernels.swiglu(*gate_up, self.activated)
        return self._product(layer, "down", self.activated, None)

    def _product(
        self, layer: Mapping[str, PackedGroup], name: str, x_mk: torch.Tensor, squares: Squares | None
    ) -> Product:
        group = layer[name]
        output = self.outputs[_kind(name, group.weights)]
        if isinstance(group.weights, PlainWeights):
            group.weights.product(x_mk, squares, output)
        else:
            self.kernels.product(x_mk, group.weights, squares, output)
        return output, RowAdapters(group.adapters, self.inputs.adapters) if group.adapters else None

    def _output(self, name: str, weights: ProductWeights | PlainWeights, buffers: SharedBuffers) -> ProductOutput:
        rows = len(self.inputs.tokens)
        if isinstance(weights, PlainWeights):
            return weights.output(name, rows, buffers)
        return self.kernels.output(name, rows, weights, buffers)

    def _add_norm(self, product: Product | None, weight_h: torch.Tensor) -> None:
        output, adapters = product or (None, None)
        self.kernels.add_norm(self.residual, output, adapters, weight_h, self.normed, self.squares)


def _kind(name: str, weights: ProductWeights | PlainWeights) -> tuple[str, type, int]:
    """What layers' groups must have in common to share an output."""
    return name, type(weights), weights.ranks
