"""Forward and backward of a group of projections on rows of tokens. m rows, k inputs, n outputs, r ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.engine.workspace import Matrix
from nybble.kernels.operations import Operations
from nybble.weights.projections import Adapter, Group


def ranks_forward(x_mk: torch.Tensor, matrix: Matrix, group: Group, seed: int, out_mr: torch.Tensor) -> None:
    """T = dropout(x) A^T of all adapters into a view."""
    if not group.dropping:
        torch.mm(x_mk, matrix.down_transposed, out=out_mr)
        return
    out_mr.zero_()
    for place, adapter in enumerate(group.adapters):
        dropped = _dropped(x_mk, adapter, seed + place)
        out_mr[:, adapter.ranks] = dropped @ matrix.down[adapter.ranks].t()


def input_gradient(
    gradient_mn: torch.Tensor, matrix: Matrix, group: Group, seed: int, out_mk: torch.Tensor | None
) -> None:
    """The ranks' gradient into the last columns of `gradient_mn`, and the input's into `out_mk` where that is wanted.

    Args:
        gradient_mn: (m, n + R), the outputs' gradient with room for the ranks' at the end of each row.
        matrix: weights and adapters.
        group: with the adapters of the forward.
        seed: the forward's, for the same dropout.
        out_mk: (m, k), or None where nothing before this layer is trained.
    """
    change = gradient_mn[:, : matrix.outputs]
    if matrix.ranks:
        torch.mm(change, matrix.up, out=gradient_mn[:, matrix.outputs :])
    if out_mk is None:
        return
    if not group.dropping:
        torch.mm(gradient_mn, matrix.backward, out=out_mk)
        return
    torch.mm(change, matrix.weights, out=out_mk)
    ranks = gradient_mn[:, matrix.outputs :]
    for place, adapter in enumerate(group.adapters):
        out_mk += _dropped(ranks[:, adapter.ranks] @ matrix.down[adapter.ranks], adapter, seed + place)


def adapter_gradients(
    operations: Operations,
    gradient_mn: torch.Tensor,
    x_mk: torch.Tensor,
    ranks_mr: torch.Tensor,
    group: Group,
    seed: int,
    sums: Sums,
) -> None:
    """Gradients of A and B on some rows, added to `sums`.

    Args:
        operations: where the float32 product is at home.
        gradient_mn: (m, n + R) as `input_gradient` left it.
        x_mk: the projections' input.
        ranks_mr: T of the forward.
        group: with the adapters of the forward.
        seed: the forward's.
        sums: over the row tiles of a batch.
    """
    outputs = gradient_mn.shape[1] - ranks_mr.shape[1]
    ranks = gradient_mn[:, outputs:]
    together = None if group.dropping else operations.product(ranks.t(), x_mk)
    for place, adapter in enumerate(group.adapters):
        if together is not None:
            to_a = together[adapter.ranks]
        else:
            to_a = operations.product(ranks[:, adapter.ranks].t(), _dropped(x_mk, adapter, seed + place))
        to_b = operations.product(gradient_mn[:, adapter.outputs].t(), ranks_mr[:, adapter.ranks])
        sums.add(adapter, to_a, to_b)


class Sums:
    """Gradients of a layer's adapters in float32, summed over row tiles."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, adapter: Adapter, to_a: torch.Tensor, to_b: torch.Tensor) -> None:
        """Add (r, k) to A's gradient and (n, r) to s B's."""
        before = self._of.get(id(adapter.a))
        if before is None:
            self._of[id(adapter.a)] = (to_a, to_b)
        else:
            before[0].add_(to_a)
            before[1].add_(to_b)

    def of(self, adapters: Sequence[Adapter]) -> list[torch.Tensor]:
        """A's and B's gradient of each adapter in turn, in the parameters' types."""
        result: list[torch.Tensor] = []
        for adapter in adapters:
            to_a, to_b = self._of[id(adapter.a)]
            if adapter.scaling != 1.0:
                to_b = to_b * adapter.scaling
            result += [to_a.to(adapter.a.dtype), to_b.to(adapter.b.dtype)]
        return result


def _dropped(x_mk: torch.Tensor, adapter: Adapter, seed: int) -> torch.Tensor:
    """Inverted dropout whose mask follows from the seed, so that backward meets the same."""
    if not adapter.dropout:
        return x_mk
    generator = torch.Generator(x_mk.device).manual_seed(seed)
    kept = torch.empty(x_mk.shape, dtype=x_mk.dtype, device=x_mk.device)
    return kept.bernoulli_(1 - adapter.dropout, generator=generator).mul_(x_mk).div_(1 - adapter.dropout)
