"""One token for each row in plain torch, in buffers that every layer uses again: for CPUs.

A step of one row is 30 layers of products of 0.1 to 0.5 ms (SmolLM2), so that what stands between them counts by its number of
operations: each writes into a view that was made once, and views of the cache are made once a step for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from nybble.generate.decoder.layers import PlainLayers


class PlainStep:
    """The step of a fixed number of rows.

    Args:
        layers: what it computes.
        rows: how many.
    """

    def __init__(self, layers: PlainLayers, rows: int) -> None:
        model = layers.model
        self.layers, self.rows = layers, rows
        self._eps = {eps: torch.tensor([[[eps]]], device=model.device) for eps in self._epsilons()}
        heads, kv_heads, size = model.heads, model.kv_heads, model.head_size

        def buffer(*shape: int, dtype: torch.dtype = layers.dtype) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=model.device)

        self._residual = buffer(model.hidden, dtype=torch.float32)
        self._normed = buffer(model.hidden, dtype=torch.float32)
        self._factor = buffer(1, 1, dtype=torch.float32)
        self._x = buffer(model.hidden)
        groups = model.layers[0].groups
        self._out = {name: buffer(group.outputs) for name, group in groups.items()}
        self._logits = buffer(model.vocabulary, dtype=torch.float32)
        self._gate, self._up = self._out["gate_up"].chunk(2, 1)

        unrotated = self._out["qkv"].view(rows, -1, size)
        values = unrotated[:, heads + kv_heads :]
        self._unrotated = unrotated[:, : heads + kv_heads]
        self._rotated = buffer(heads + kv_heads, size)
        self._halves = [each.chunk(2, -1) for each in (self._unrotated, self._rotated)]
        self._queries = self._rotated[:, :heads].view(rows, 1, kv_heads, heads // kv_heads, size).unbind(0)
        self._new = [*self._rotated[:, heads:].unbind(0), *values.unbind(0)]
        self._attended = buffer(heads * size)
        self._attended_rows = self._attended.view(rows, 1, kv_heads, heads // kv_heads, size).unbind(0)

    def run(
        self,
        ids: torch.Tensor,
        states: Sequence[torch.Tensor],
        lengths: Sequence[int],
        adapters: Mapping[str | None, torch.Tensor | slice],
    ) -> torch.Tensor:
        """Logits, (rows, vocabulary) float32, in a buffer that the next call overwrites.

        Args:
            ids: (rows,)
            states: of each row, (layers, 2, kv heads, tokens, size); the new token's keys and values are written into it.
            lengths: tokens that each row has in it.
            adapters: which rows are computed with which adapter.
        """
        model, layers = self.layers.model, self.layers
        self._residual.copy_(model.embedding.index_select(0, ids))
        cosine, sine = (table.unsqueeze(1) for table in layers.rotary(torch.tensor(lengths, device=ids.device)))
        sines = sine.chunk(2, -1)
        pairs = list(zip(states, lengths, strict=True))
        places = [each[:, :, :, length].flatten(0, 1).unbind(0) for each, length in pairs]
        pasts = [each[:, :, :, : length + 1].flatten(0, 1).unsqueeze(1).unbind(0) for each, length in pairs]
        for index, layer in enumerate(model.layers):
            self._norm(layer.norms[0], layer.eps[0], self._x)
            self._rotate(self._product(index, "qkv", self._x, adapters), cosine, sines)
            torch._foreach_copy_([row[2 * index + n] for n in (0, 1) for row in places], self._new)
            self._attend([(row[2 * index], row[2 * index + 1]) for row in pasts])
            self._residual.add_(self._product(index, "o", self._attended, adapters))
            self._norm(layer.norms[1], layer.eps[1], self._x)
            self._product(index, "gate_up", self._x, adapters)
            activated = silu(self._gate).mul_(self._up)
            self._residual.add_(self._product(index, "down", activated, adapters))
        return self._compute_logits()

    def _epsilons(self) -> set[float]:
        model = self.layers.model
        return {model.eps, *(eps for layer in model.layers for eps in layer.eps)}

    def _norm(self, weight_h: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """The norm of the residual stream; the mean square is one product, where rms_norm takes six operations."""
        residual = self._residual
        columns, lines = residual.unsqueeze(2), residual.unsqueeze(1)
        torch.baddbmm(self._eps[eps], lines, columns, alpha=1 / residual.shape[1], out=self._factor)
        torch.mul(residual, self._factor.rsqrt_().squeeze(2), out=self._normed)
        torch.mul(self._normed, weight_h, out=out)

    def _product(
        self, index: int, name: str, x_mk: torch.Tensor, adapters: Mapping[str | None, torch.Tensor | slice]
    ) -> torch.Tensor:
        return self.layers.product(index, name, x_mk, adapters, self._out[name])

    def _rotate(self, qkv: torch.Tensor, cosine: torch.Tensor, sines: Sequence[torch.Tensor]) -> None:
        """Rotary positions of q and k; the sign of the first half is in its sines."""
        (first, second), (rotated_first, rotated_second) = self._halves
        torch.mul(self._unrotated, cosine, out=self._rotated)
        rotated_first.addcmul_(second, sines[0])
        rotated_second.addcmul_(first, sines[1])

    def _attend(self, pasts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Each row's query heads that share keys are to the attention like tokens of one head, all of which see everything."""
        outs = [
            scaled_dot_product_attention(query, keys, values)
            for query, (keys, values) in zip(self._queries, pasts, strict=True)
        ]
        torch._foreach_copy_(self._attended_rows, outs)

    def _compute_logits(self) -> torch.Tensor:
        model = self.layers.model
        if model.head.dtype == torch.float32 == self._x.dtype:
            self._norm(model.norm, model.eps, self._x)
            return torch.mm(self._x, model.head.t(), out=self._logits)
        x = torch.empty_like(self._x, dtype=model.head.dtype)
        self._norm(model.norm, model.eps, x)
        return self._logits.copy_(torch.mm(x, model.head.t()))
