"""Adapters and weights of a group of projections as the CUDA kernels take them.

A of all adapters stands below the weights, one after another, so that one product computes W x and every T = A x; B stays
apart for each projection, since T of one row goes through one adapter only. Ranks are filled up to multiples of 8 with zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nybble.generate.decoder.layers import PackedAdapter
from nybble.generate.decoder.plain_weights import PlainWeights
from nybble.kernels.cuda.arguments import MAX_ADAPTERS, Adapter
from nybble.kernels.cuda.kernels import ProductWeights, QuantisedWeight
from nybble.kernels.cuda.layout import BLOCK, SLAB
from nybble.weights.frozen import FrozenWeight
from nybble.weights.projections import ActiveAdapter, ProjectionGroup
from nybble.weights.watched import Ineligible

RANK_STEP = 8  # of B's rows: 16 bytes
MAX_RANK = 256  # of common.cuh
NESTED_BLOCK = 256  # scales with one scale


@dataclass(frozen=True)
class PackedGroup:
    """One group of one layer."""

    weights: ProductWeights | PlainWeights
    adapters: Sequence[Sequence[Adapter]]
    """For each adapter, its part in each projection; none at all where no adapter changes the group."""
    above: torch.Tensor | None
    """B of every adapter, to which their parts point."""
    named: Mapping[str, PackedAdapter | None]
    """The same adapters as `PlainLayers` takes them: views, no copies."""


def pack_group(group: ProjectionGroup, adapters: Mapping[str, Sequence[ActiveAdapter]]) -> PackedGroup:
    """A group with all of its adapters, in their order.

    Raises:
        Ineligible: a weight or a rank that the kernels do not take.
    """
    check_group(group, adapters)
    named = [(name, each) for name, projections in adapters.items() for each in projections]
    if not named:
        return PackedGroup(_weights(group, None), (), None, dict.fromkeys(adapters))
    ranks = [-(-each.a.shape[0] // RANK_STEP) * RANK_STEP for _, each in named]
    below = torch.cat([_padded(each.a.detach(), rank, 0) for (_, each), rank in zip(named, ranks, strict=True)])
    ups = [_padded(each.b.detach(), rank, 1).flatten() for (_, each), rank in zip(named, ranks, strict=True)]
    above = torch.cat(ups)
    starts = [0, *itertools.accumulate(len(up) for up in ups)]
    first_output = [0, *itertools.accumulate(weight.outputs for weight in group.frozen)]
    entries = {name: [Adapter() for _ in group.frozen] for name in adapters}
    columns = [0, *itertools.accumulate(ranks)]
    for index, (name, each) in enumerate(named):
        address = above.data_ptr() + above.element_size() * starts[index]
        entries[name][first_output.index(each.outputs.start)] = Adapter(
            address, columns[index], ranks[index], each.scaling, 0
        )
    below = _padded(below, -(-len(below) // SLAB) * SLAB, 0)
    matrices = [above[start:end] for start, end in itertools.pairwise(starts)]
    parts = [
        _Part(name, each, slice(*span), matrix.view(-1, rank).t())
        for (name, each), span, rank, matrix in zip(named, itertools.pairwise(columns), ranks, matrices, strict=True)
    ]
    views = {name: _view([part for part in parts if part.adapter == name], below) for name in adapters}
    return PackedGroup(_weights(group, below), tuple(entries.values()), above, views)


class _Part(NamedTuple):
    """One adapter of one projection."""

    adapter: str
    active: ActiveAdapter
    rows: slice
    """Of A, among those of all adapters."""
    up: torch.Tensor
    """B transposed, (rank, outputs)"""


def _view(parts: Sequence[_Part], below: torch.Tensor) -> PackedAdapter | None:
    """One adapter of a group, whose parts stand one after another; None where it does not change the group."""
    if not parts:
        return None
    first, last = parts[0].rows.start, parts[-1].rows.stop
    ups = [
        (each.outputs, slice(rows.start - first, rows.stop - first), up, each.scaling) for _, each, rows, up in parts
    ]
    return PackedAdapter(below[first:last], ups)


def check_group(group: ProjectionGroup, adapters: Mapping[str, Sequence[ActiveAdapter]]) -> None:
    """Whether the kernels take a group.

    Raises:
        Ineligible: the first reason why they do not.
    """
    if len({weight.is_quantised for weight in group.frozen}) > 1:
        raise Ineligible("some projections of one layer are quantised, others not")
    for weight in group.frozen:
        if weight.outputs % 4:
            raise Ineligible(f"a projection has {weight.outputs} outputs, not a multiple of 4")
        if not weight.is_quantised and weight.stored.dtype != torch.bfloat16:
            raise Ineligible(f"a weight is in {str(weight.stored.dtype).removeprefix('torch.')}, not bfloat16")
    if group.frozen[0].code is not None:
        _check_quantised(group)
    if len(adapters) > MAX_ADAPTERS:
        raise Ineligible(f"there are {len(adapters)} adapters, more than {MAX_ADAPTERS}")
    ranks = [each.a.shape[0] for projections in adapters.values() for each in projections]
    if max(ranks, default=0) > MAX_RANK:
        raise Ineligible(f"an adapter has rank {max(ranks)}, above {MAX_RANK}")


def _check_quantised(group: ProjectionGroup) -> None:
    """Whether all weights of a group are quantised alike, in blocks that the kernels know.

    Raises:
        Ineligible: they are not.
    """
    first = group.frozen[0]
    for weight in group.frozen:
        if weight.blocksize != BLOCK:
            raise Ineligible(f"weights are quantised in blocks of {weight.blocksize}, not {BLOCK}")
        if weight.code is None or first.code is None or not torch.equal(weight.code, first.code):
            raise Ineligible("projections of one layer are quantised to different values")
        if (weight.nested is None) != (first.nested is None):
            raise Ineligible("the scales of some projections are quantised, of others not")
        if weight.nested is not None and first.nested is not None:
            if weight.nested.blocksize != NESTED_BLOCK:
                raise Ineligible(f"scales are quantised in blocks of {weight.nested.blocksize}, not {NESTED_BLOCK}")
            if not torch.equal(weight.nested.code, first.nested.code):
                raise Ineligible("scales of one layer are quantised to different values")


def _weights(group: ProjectionGroup, below: torch.Tensor | None) -> ProductWeights | PlainWeights:
    if not group.frozen[0].is_quantised:
        return PlainWeights([weight.stored for weight in group.frozen], below)
    return ProductWeights([_quantised(weight) for weight in group.frozen], below, group.inputs)


def _padded(matrix: torch.Tensor, size: int, dimension: int) -> torch.Tensor:
    """In bf16, with zeros up to a size."""
    missing = size - matrix.shape[dimension]
    fill = (0, missing) if dimension == 1 else (0, 0, 0, missing)
    return torch.nn.functional.pad(matrix.to(torch.bfloat16), fill).contiguous()


def _quantised(weight: FrozenWeight) -> QuantisedWeight:
    assert weight.code is not None, "check_group looks first"
    return QuantisedWeight(weight.stored, weight.absmax, weight.code, weight.nested, weight.outputs)
