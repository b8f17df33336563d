"""The decoder layers in plain torch: for prompts on any device, and for every token where there are no CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, rms_norm, silu

from nybble.generate.decoder.model import DecoderModel
from nybble.kernels import operations
from nybble.weights.projections import ActiveAdapter, ProjectionGroup
from nybble.weights.store import dequantise

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer's number, q (tokens, heads, size), k and v (tokens, kv heads, size), rotated, to (tokens, heads, size)."""


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
    return PackedAdapter(
        torch.cat([each.a.detach().to(dtype) for each in projections]),
        [(each.outputs, each.ranks, each.b.detach().to(dtype).t().contiguous(), each.scaling) for each in projections],
    )


class PlainLayers:
    """All layers of a model.

    Args:
        model: whose own weights are used; 4-bit ones are dequantised at each use, into one buffer.
    """

    def __init__(self, model: DecoderModel) -> None:
        self.model, self.dtype = model, model.embedding.dtype
        self.adapters = [
            {
                group: {name: pack_adapter(projections, self.dtype) for name, projections in named.items()}
                for group, named in layer.adapters.items()
            }
            for layer in model.layers
        ]
        self._operations = operations.choose(model.device).operations
        self._buffer = torch.empty(0, dtype=self.dtype, device=model.device)

    def run(
        self,
        ids: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        adapters: Mapping[str | None, torch.Tensor | slice],
        attend: Attend,
    ) -> torch.Tensor:
        """The residual stream after all layers, (tokens, h) float32.

        Args:
            ids: (tokens,)
            rotary: cosine and sine of the tokens' positions, (tokens, 1, size / 2) each.
            adapters: which tokens are computed with which adapter.
            attend: stores keys and values and attends.
        """
        model, tokens = self.model, len(ids)
        residual = model.embedding.index_select(0, ids).float()
        split = [model.heads, model.kv_heads, model.kv_heads]
        for index, layer in enumerate(model.layers):
            x = self._norm(residual, layer.norms[0], layer.eps[0])
            q, k, v = self._product(index, "qkv", x, adapters).view(tokens, -1, model.head_size).split(split, 1)
            attended = attend(index, rotate(q, *rotary), rotate(k, *rotary), v)
            residual += self._product(index, "o", attended.reshape(tokens, -1), adapters)
            x = self._norm(residual, layer.norms[1], layer.eps[1])
            gate, up = self._product(index, "gate_up", x, adapters).chunk(2, 1)
            residual += self._product(index, "down", silu(gate).mul_(up), adapters)
        return residual

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """(tokens, vocabulary) float32."""
        return linear(
            self._norm(residual, self.model.norm, self.model.eps).to(self.model.head.dtype), self.model.head
        ).float()

    def _norm(self, residual: torch.Tensor, weight_h: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(residual, weight_h.shape, weight_h, eps).to(self.dtype)

    def _product(
        self, index: int, name: str, x_mk: torch.Tensor, adapters: Mapping[str | None, torch.Tensor | slice]
    ) -> torch.Tensor:
        out = self._base_product(self.model.layers[index].groups[name], x_mk)
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

    def _base_product(self, group: ProjectionGroup, x_mk: torch.Tensor) -> torch.Tensor:
        if group.frozen[0].is_quantised:
            return linear(x_mk, self._dequantised(group))
        outs = [linear(x_mk, weight.stored) for weight in group.frozen]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

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


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021) of (tokens, heads, size), in float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


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


def tokens_of(adapters: Sequence[str | None]) -> Mapping[str | None, torch.Tensor | slice]:
    """Which rows have which adapter: all of them as a slice where they agree."""
    distinct = dict.fromkeys(adapters)
    if len(distinct) == 1:
        return dict.fromkeys(distinct, slice(None))
    return {name: torch.tensor([row for row, own in enumerate(adapters) if own == name]) for name in distinct}
