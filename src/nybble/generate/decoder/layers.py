"""The decoder layers in plain torch: for prompts on any device, and for every token where there are no CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear, rms_norm, silu

from nybble.generate.decoder.model import DecoderModel
from nybble.generate.transfers import to_device
from nybble.kernels import operations, reference
from nybble.weights.projections import ActiveAdapter, ProjectionGroup
from nybble.weights.store import dequantise

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's number, q (tokens, heads, size), k and v (tokens, kv heads, size), q and k rotated, to (tokens, heads, size)."""
Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of each token's position, (tokens, size) float32."""

JOINED_RANKS = 64
"""Up to which all B of a group are one matrix on a CPU, with zeros beside the diagonal: for q, k and v of rank 16 one product of
5 us instead of three that take 27."""


class Elementwise(Protocol):
    """What stands between products and attention."""

    def norm(self, residual: torch.Tensor, weight_h: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """The norm of each row, in a type."""

    def rotate(self, qkv: torch.Tensor, rotary: Rotary, rotated_heads: int, head_size: int) -> None:
        """Rotary positions of q and k, the first heads of each row, in place."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) x up."""


class TorchElementwise:
    """In torch's own functions: fewer calls than the reference of the kernels, for CPUs."""

    def norm(self, residual: torch.Tensor, weight_h: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """See `Elementwise.norm`."""
        return rms_norm(residual, weight_h.shape, weight_h, eps).to(dtype)

    def rotate(self, qkv: torch.Tensor, rotary: Rotary, rotated_heads: int, head_size: int) -> None:
        """See `Elementwise.rotate`."""
        cosine, sine = (table.unsqueeze(1) for table in rotary)
        x = qkv[:, : rotated_heads * head_size].view(len(qkv), rotated_heads, head_size)
        turned = x.roll(head_size // 2, -1)  # the sign of its first half is in the table of sines
        x.copy_(torch.addcmul(x * cosine, turned, sine))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Elementwise.swiglu`."""
        gate, up = gate_up.chunk(2, 1)
        return silu(gate).mul_(up)


class FusedElementwise:
    """In the engine's fused operations."""

    def __init__(self, fused: operations.Operations) -> None:
        self._fused = fused

    def norm(self, residual: torch.Tensor, weight_h: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """See `Elementwise.norm`."""
        out = torch.empty_like(residual, dtype=dtype)
        self._fused.rms_norm(residual, weight_h, eps, out)
        return out

    def rotate(self, qkv: torch.Tensor, rotary: Rotary, rotated_heads: int, head_size: int) -> None:
        """See `Elementwise.rotate`."""
        self._fused.rope(qkv, *rotary, rotated_heads, head_size, 0)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Elementwise.swiglu`."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._fused.swiglu(gate_up, out)
        return out


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter of a group of projections: A of all of them together, B of each."""

    down: torch.Tensor
    """(ranks, inputs)"""
    ups: Sequence[tuple[slice, slice, torch.Tensor, float]]
    """Outputs, ranks, B transposed and the scale of each projection."""

    def add(self, x_mk: torch.Tensor, out_mn: torch.Tensor) -> None:
        """s B A x, added to outputs."""
        t = linear(x_mk, self.down)
        for outputs, ranks, up, scaling in self.ups:
            out_mn[:, outputs].addmm_(t[:, ranks], up, alpha=scaling)


def pack_adapter(projections: Sequence[ActiveAdapter], dtype: torch.dtype) -> PackedAdapter | None:
    """An adapter of a group, or None where it does not change the group."""
    if not projections:
        return None
    down = torch.cat([each.a.detach().to(dtype) for each in projections])
    scalings = {each.scaling for each in projections}
    if down.device.type == "cpu" and len(down) <= JOINED_RANKS and len(scalings) == 1:
        outputs = projections[-1].outputs.stop
        up = torch.zeros(len(down), outputs, dtype=dtype)
        for each in projections:
            up[each.ranks, each.outputs] = each.b.detach().to(dtype).t()
        return PackedAdapter(down, [(slice(outputs), slice(len(down)), up, scalings.pop())])
    return PackedAdapter(
        down,
        [(each.outputs, each.ranks, each.b.detach().to(dtype).t().contiguous(), each.scaling) for each in projections],
    )


class PlainLayers:
    """All layers of a model.

    Args:
        model: whose own weights are used; 4-bit ones are dequantised at each use, into one buffer.
        adapters: of each layer and group, by name; None to pack them here.
    """

    def __init__(
        self,
        model: DecoderModel,
        adapters: Sequence[Mapping[str, Mapping[str, PackedAdapter | None]]] | None = None,
    ) -> None:
        self.model, self.dtype = model, model.embedding.dtype
        self.adapters = adapters or [
            {
                group: {name: pack_adapter(projections, self.dtype) for name, projections in named.items()}
                for group, named in layer.adapters.items()
            }
            for layer in model.layers
        ]
        self._operations = operations.choose(model.device).operations
        fused = self._operations is not reference
        self._elementwise: Elementwise = FusedElementwise(self._operations) if fused else TorchElementwise()
        self._tables = self._make_tables(model, fused)
        self._buffer = torch.empty(0, dtype=self.dtype, device=model.device)

    def rotary(self, positions: torch.Tensor | slice) -> Rotary:
        """Of tokens at these positions."""
        return self._tables[0][positions], self._tables[1][positions]

    def run(
        self, ids: torch.Tensor, rotary: Rotary, adapters: Mapping[str | None, torch.Tensor | slice], attend: Attend
    ) -> torch.Tensor:
        """The residual stream after all layers, (tokens, h) float32.

        Args:
            ids: (tokens,)
            rotary: of the tokens' positions.
            adapters: which tokens are computed with which adapter.
            attend: stores keys and values and attends.
        """
        model, between, size = self.model, self._elementwise, self.model.head_size
        residual = model.embedding.index_select(0, ids).float()
        split = [model.heads, model.kv_heads, model.kv_heads]
        for index, layer in enumerate(model.layers):
            x = between.norm(residual, layer.norms[0], layer.eps[0], self.dtype)
            qkv = self.product(index, "qkv", x, adapters)
            between.rotate(qkv, rotary, model.heads + model.kv_heads, size)
            attended = attend(index, *qkv.view(len(ids), -1, size).split(split, 1))
            residual += self.product(index, "o", attended.reshape(len(ids), -1), adapters)
            x = between.norm(residual, layer.norms[1], layer.eps[1], self.dtype)
            activated = between.swiglu(self.product(index, "gate_up", x, adapters))
            residual += self.product(index, "down", activated, adapters)
        return residual

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """(tokens, vocabulary) float32."""
        model = self.model
        return linear(self._elementwise.norm(residual, model.norm, model.eps, model.head.dtype), model.head).float()

    @staticmethod
    def _make_tables(model: DecoderModel, fused: bool) -> Rotary:
        """Of all positions, (positions, size) float32; for `TorchElementwise` the first half's sine is negative."""
        cosine, sine = model.rotary_tables(model.positions)
        return torch.cat((cosine, cosine), 1), torch.cat((sine if fused else -sine, sine), 1)

    def product(
        self,
        index: int,
        name: str,
        x_mk: torch.Tensor,
        adapters: Mapping[str | None, torch.Tensor | slice],
        out_mn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A group's product with its adapters, (tokens, outputs).

        Args:
            index: the layer's.
            name: the group's.
            x_mk: (tokens, inputs)
            adapters: which tokens are computed with which adapter.
            out_mn: where to write it; None for a new tensor.
        """
        out = self._base_product(self.model.layers[index].groups[name], x_mk, out_mn)
        for adapter, tokens in adapters.items():
            packed = None if adapter is None else self.adapters[index][name][adapter]
            if packed is None:
                continue
            if isinstance(tokens, slice):
                packed.add(x_mk[tokens], out[tokens])
            else:
                own = out[tokens]
                packed.add(x_mk[tokens], own)
                out[tokens] = own
        return out

    def _base_product(self, group: ProjectionGroup, x_mk: torch.Tensor, out_mn: torch.Tensor | None) -> torch.Tensor:
        weights = (
            [self._dequantised(group)] if group.frozen[0].is_quantised else [weight.stored for weight in group.frozen]
        )
        if out_mn is None:
            outs = [linear(x_mk, weight) for weight in weights]
            return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
        parts = out_mn.split([len(weight) for weight in weights], 1)
        for weight, part in zip(weights, parts, strict=True):
            torch.mm(x_mk, weight.t(), out=part)
        return out_mn

    def _dequantised(self, group: ProjectionGroup) -> torch.Tensor:
        """The group's weights, one below the other, in a buffer that the next group overwrites."""
        needed = group.outputs * group.inputs
        if self._buffer.numel() < needed:
            self._buffer = torch.empty(needed, dtype=self.dtype, device=self.model.device)
        whole = self._buffer[:needed].view(group.outputs, group.inputs)
        row = 0
        for weight in group.frozen:
            dequantise(self._operations, weight, whole[row : row + weight.outputs])
            row += weight.outputs
        return whole


def attend_to(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of a sequence's last tokens.

    Args:
        q: (tokens, heads, size), of the last tokens.
        keys: (kv heads, length, size), of all.
        values: the same.

    Returns:
        (tokens, heads, size)
    """
    tokens, heads, size = q.shape
    kv_heads, length, _ = keys.shape
    if tokens == 1:
        grouped = q.view(kv_heads, heads // kv_heads, size)
        weights = torch.baddbmm(grouped.new_empty(()), grouped, keys.transpose(1, 2), beta=0, alpha=size**-0.5)
        return torch.bmm(weights.float().softmax(-1).to(q.dtype), values).view(1, heads, size)
    mask = None
    if tokens < length:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask, is_causal=mask is None,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return out.squeeze(0).transpose(0, 1)


def tokens_of(adapters: Sequence[str | None], device: torch.device) -> Mapping[str | None, torch.Tensor | slice]:
    """Which rows have which adapter: all of them as a slice where they agree."""
    distinct = dict.fromkeys(adapters)
    if len(distinct) == 1:
        return dict.fromkeys(distinct, slice(None))
    return {name: to_device([row for row, own in enumerate(adapters) if own == name], device) for name in distinct}
