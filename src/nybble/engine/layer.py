"""A decoder layer of the Llama architecture: what it consists of, one call of it, and what a call keeps for backward.

Shape suffixes: m tokens of the batch (its rows one after another), h hidden, i intermediate, n outputs, r ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nybble.engine.attention import Backend, Saved, Segments
from nybble.engine.host import Handle, HostStore
from nybble.engine.linear import ranks_forward
from nybble.engine.workspace import Matrix, Workspace
from nybble.kernels import operations as ops
from nybble.kernels.operations import Operations
from nybble.plan.policies import tile
from nybble.plan.shapes import LayerShape
from nybble.weights.projections import Group

GROUPS = ("qkv", "o", "gate_up", "down")
# Several tiles go back and forth between groups, which then stand side by side; q-k-v is never needed beside gate-up.
SIDE_BY_SIDE = {"qkv": "wide", "o": "o", "gate_up": "wide", "down": "down"}
ONE_AFTER_ANOTHER = dict.fromkeys(GROUPS, "wide")


def slots(tiles: int) -> Mapping[str, str]:
    """Which part of the workspace each group stands in."""
    return SIDE_BY_SIDE if tiles > 1 else ONE_AFTER_ANOTHER


Ranks = dict[tuple[str, int], torch.Tensor]
"""T = x A^T, (m, R), of a group on the tile that begins at a row."""


@dataclass(frozen=True)
class Sizes:
    """Of a layer's attention and norms."""

    heads: int
    key_heads: int
    head_size: int
    hidden: int
    intermediate: int
    eps: tuple[float, float]


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer as it is now."""

    groups: Mapping[str, Group]
    norms: tuple[torch.nn.Parameter, torch.nn.Parameter]
    """Weights of the norms before attention and before the MLP, (h,)."""
    sizes: Sizes

    def shape(self, dtype: torch.dtype, residual: torch.dtype) -> LayerShape:
        """Sizes for the memory plan."""
        sizes = self.sizes
        q, o, g, d = (self.groups[name].ranks for name in GROUPS)
        return LayerShape(
            sizes.hidden, sizes.intermediate, sizes.heads, sizes.key_heads, sizes.head_size, (q, o, g, d),
            dtype.itemsize, residual.itemsize,
        )  # fmt: skip

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' tensors in the order of their gradients."""
        return [part for name in GROUPS for own in self.groups[name].adapters for part in (own.a, own.b)]


class Shared:
    """What the layers of a model have in common on one device.

    Attributes:
        operations: the kernels or their reference.
        reason: why those.
        workspace: where weights are dequantised.
        store: layer inputs on the host.
        went_back: whether any layer has seen a backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.operations, self.reason = ops.choose(device)
        self.workspace = Workspace(self.operations, device)
        self.store = HostStore(device)
        self.went_back = False
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time: what is shared is filled and used within a turn, and nothing in it is good after.

        Threads on streams of their own wait for one another on the device.
        """
        with self._lock:
            if self.device.type == "cuda":
                stream = torch.cuda.current_stream(self.device)
                if self._stream is not None and self._stream != stream:
                    stream.wait_stream(self._stream)
                    self.workspace.record_stream(stream)
                self._stream = stream
            yield

    def __reduce__(self) -> Any:
        """A copy of a model has buffers and streams of its own."""
        return Shared, (self.device,)


@dataclass
class Batch:
    """What all layers share of one batch."""

    segments: Segments
    attention: Backend
    dtype: torch.dtype
    """Of weights and activations; the residual stream keeps its own."""
    shared: Shared
    cosine: torch.Tensor | None = None
    """(positions, head size); token m stands at row m modulo its length. The first layer is told."""
    sine: torch.Tensor | None = None

    def tiles(self, policy: str) -> list[slice]:
        """Rows of tokens, in equal parts."""
        tokens, largest = self.segments.tokens, tile(policy, self.segments.tokens)
        step = -(-tokens // -(-tokens // largest))
        return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


@dataclass(frozen=True)
class Call:
    """One use of a layer."""

    layer: FusedLayer
    batch: Batch
    tiles: Sequence[slice]
    policy: str | None
    """None where there will be no backward."""
    seed: int
    """From which every dropout mask of this call follows."""

    @property
    def operations(self) -> Operations:
        return self.batch.shared.operations

    def matrix(self, name: str) -> Matrix:
        """A group's weights and adapters, in the workspace."""
        slot = slots(len(self.tiles))[name]
        return self.batch.shared.workspace.matrix(self.layer.groups[name], slot, self.batch.dtype)

    def ranks_seed(self, name: str, rows: slice) -> int:
        """Seed of a group's dropout on a tile; a group has three projections at most."""
        first: int = rows.start
        return self.seed + 4 * (4 * first + GROUPS.index(name))

    def room(self, rows: slice, outputs: int, ranks: int = 0) -> torch.Tensor:
        """An empty (m, outputs + ranks) for a tile: ranks stand beside what they belong to."""
        return torch.empty(
            (rows.stop - rows.start, outputs + ranks), dtype=self.batch.dtype, device=self.batch.shared.device
        )

    def fill_ranks(self, name: str, wide: torch.Tensor, rows: slice, kept: Ranks | None) -> None:
        """T = x A^T into the last columns of (m, inputs + R): computed, or as kept; what is computed is kept."""
        matrix = self.matrix(name)
        if not matrix.ranks:
            return
        place = wide[:, matrix.inputs :]
        if kept is not None and (name, rows.start) in kept:
            place.copy_(kept[name, rows.start])
            return
        ranks_forward(wide[:, : matrix.inputs], matrix, self.layer.groups[name], self.ranks_seed(name, rows), place)
        if kept is not None:
            kept[name, rows.start] = place.clone()


@dataclass
class Kept:
    """Activations between forward and backward; what is None is computed again."""

    x_mh: torch.Tensor | Handle | None = None
    qkv: torch.Tensor | None = None
    """(m, q + k + v), rotated"""
    out: torch.Tensor | None = None
    """Attention's result, (m, heads, head size)"""
    saved: Saved = ()
    sum_mh: torch.Tensor | None = None
    """The residual stream after attention."""
    gate_up: torch.Tensor | None = None
    """(m, 2 i + R), with room for the ranks' gradient"""
    ranks: Ranks = field(default_factory=dict)

    def for_one_backward(self) -> Kept:
        """What a backward may use up while this stays for another: gate and up, which become gradients, are computed again."""
        return dataclasses.replace(self, gate_up=None, ranks=dict(self.ranks))
