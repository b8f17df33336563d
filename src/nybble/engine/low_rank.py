"""LoRA's part of the products of a group of projections, independent of how the frozen weights are multiplied.

m rows, k inputs, n outputs, r ranks of one adapter, R those of all adapters of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels.operations import Operations
from nybble.weights.projections import ActiveAdapter, ProjectionGroup


def ranks_forward(
    x_mk: torch.Tensor, a_kr: torch.Tensor, group: ProjectionGroup, seed: int, out_mr: torch.Tensor
) -> None:
    """Write T = dropout(x) A^T of all adapters into a view.

    Args:
        x_mk: the projections' input.
        a_kr: A^T of all adapters, (k, R), in the type of x.
        group: the group of the adapters.
        seed: determines the dropout masks, one for each adapter.
        out_mr: (m, R) view.
    """
    if not group.has_dropout:
        torch.mm(x_mk, a_kr, out=out_mr)
        return
    out_mr.zero_()
    for index, adapter in enumerate(group.adapters):
        dropped = dropout(x_mk, adapter, seed + index)
        out_mr[:, adapter.ranks] = dropped @ a_kr[:, adapter.ranks]


def add_input_gradient(
    to_ranks_mr: torch.Tensor, a_rk: torch.Tensor, group: ProjectionGroup, seed: int, out_mk: torch.Tensor
) -> None:
    """Add dropout(dT A), the adapters' part of the input's gradient, where they have dropout."""
    for index, adapter in enumerate(group.adapters):
        out_mk += dropout(to_ranks_mr[:, adapter.ranks] @ a_rk[adapter.ranks], adapter, seed + index)


class AdapterGradients:
    """Gradients of a layer's adapters in float32, summed over the tiles of a batch."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(
        self,
        group: ProjectionGroup,
        gradient_mn: torch.Tensor,
        to_ranks_mr: torch.Tensor,
        x_mk: torch.Tensor,
        ranks_mr: torch.Tensor,
        seed: int,
    ) -> None:
        """Add the gradients of one group and tile: dA = dT^T dropout(x), d(sB) = dY^T T.

        Args:
            group: the group, with the adapters of the forward.
            gradient_mn: dY.
            to_ranks_mr: dT = dY s B.
            x_mk: the projections' input.
            ranks_mr: T of the forward.
            seed: the forward's, for the same dropout masks.
        """
        product = self._operations.product
        to_all_a = None if group.has_dropout else product(to_ranks_mr.t(), x_mk)
        for index, adapter in enumerate(group.adapters):
            if to_all_a is not None:
                to_a = to_all_a[adapter.ranks]
            else:
                to_a = product(to_ranks_mr[:, adapter.ranks].t(), dropout(x_mk, adapter, seed + index))
            to_b = product(gradient_mn[:, adapter.outputs].t(), ranks_mr[:, adapter.ranks])
            self._add(adapter, to_a, to_b)

    def _add(self, adapter: ActiveAdapter, to_a: torch.Tensor, to_b: torch.Tensor) -> None:
        before = self._sums.get(id(adapter.a))
        if before is None:
            self._sums[id(adapter.a)] = (to_a, to_b)
        else:
            before[0].add_(to_a)
            before[1].add_(to_b)

    def of(self, adapters: Sequence[ActiveAdapter]) -> list[torch.Tensor]:
        """The gradients of A and B of each adapter in turn, in the parameters' types."""
        result: list[torch.Tensor] = []
        for adapter in adapters:
            to_a, to_b = self._sums[id(adapter.a)]
            if adapter.scaling != 1.0:
                to_b = to_b * adapter.scaling
            result += [to_a.to(adapter.a.dtype), to_b.to(adapter.b.dtype)]
        return result


def dropout(x_mk: torch.Tensor, adapter: ActiveAdapter, seed: int) -> torch.Tensor:
    """Inverted dropout with a mask that the seed determines, so that backward draws the same one."""
    if not adapter.dropout:
        return x_mk
    generator = torch.Generator(x_mk.device).manual_seed(seed)
    mask = torch.empty(x_mk.shape, dtype=x_mk.dtype, device=x_mk.device)
    return mask.bernoulli_(1 - adapter.dropout, generator=generator).mul_(x_mk).div_(1 - adapter.dropout)
