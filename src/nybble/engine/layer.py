"""A decoder layer of the Llama architecture: what it consists of, one call of it, and what a call saves for backward.

Shape suffixes: m tokens of the batch (its rows one after another), h hidden, i intermediate, n outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nybble.engine.attention.backend import Backend, BackendState, Segments
from nybble.engine.offload import ActivationOffload, OffloadedTensor
from nybble.engine.product import AugmentedProduct, Product, SavedRanks
from nybble.engine.product_fp8 import Fp8Product, Peaks
from nybble.engine.workspace import Workspace
from nybble.kernels import operations as ops
from nybble.kernels.operations import Operations
from nybble.plan.policies import tile
from nybble.plan.shapes import LayerShape
from nybble.weights.projections import ProjectionGroup
from nybble.weights.store import ResidentStore
from nybble.weights.streamed import StreamedStore

GROUPS = ("qkv", "o", "gate_up", "down")
# Several tiles alternate between the groups, which then need separate slots; qkv is never needed together with gate_up.
SIDE_BY_SIDE = {"qkv": "wide", "o": "o", "gate_up": "wide", "down": "down"}
ONE_AFTER_ANOTHER = dict.fromkeys(GROUPS, "wide")


def slots(tiles: int) -> Mapping[str, str]:
    """The slot of the workspace for each group."""
    return SIDE_BY_SIDE if tiles > 1 else ONE_AFTER_ANOTHER


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer's attention, MLP and norms."""

    heads: int
    key_heads: int
    head_size: int
    hidden: int
    intermediate: int
    eps: tuple[float, float]


@dataclass(frozen=True)
class FusedLayer:
    """A decoder layer as it is now."""

    groups: Mapping[str, ProjectionGroup]
    norms: tuple[torch.nn.Parameter, torch.nn.Parameter]
    """Weights of the norms before attention and before the MLP, (h,)."""
    sizes: LayerSizes

    def shape(self, dtype: torch.dtype, residual: torch.dtype, fp8: Collection[str] = ()) -> LayerShape:
        """Sizes for the memory plan; `fp8` names the groups that are computed in fp8."""
        sizes = self.sizes
        q, o, g, d = (self.groups[name].ranks for name in GROUPS)
        return LayerShape(
            sizes.hidden, sizes.intermediate, sizes.heads, sizes.key_heads, sizes.head_size, (q, o, g, d),
            dtype.itemsize, residual.itemsize, tuple(name in fp8 for name in GROUPS),
        )  # fmt: skip

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' tensors in the order of their gradients."""
        return [part for name in GROUPS for adapter in self.groups[name].adapters for part in (adapter.a, adapter.b)]


class Shared:
    """What the layers of a model have in common on one device.

    Attributes:
        operations: the kernels or their reference.
        reason: why these operations were chosen.
        workspace: where weights are dequantised.
        streamed: the store of weights that are not on the device, if any.
        peaks: the scales of weights in fp8.
        offload: layer inputs on the host.
        has_seen_backward: whether any layer has run backward.
    """

    def __init__(self, device: torch.device, streamed: StreamedStore | None = None) -> None:
        """
        Args:
            device: where the layers are computed.
            streamed: the store of weights that are on the host or spread over ranks; without it they are on the device.
        """
        self.device = device
        choice = ops.choose(device)
        self.operations, self.reason = choice.operations, str(choice)
        self.streamed = streamed
        store = streamed or ResidentStore(self.operations)
        self.workspace = Workspace(store, self.operations, device)
        self.peaks = Peaks(store)
        self.offload = ActivationOffload(device)
        self.has_seen_backward = False
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One thread at a time: shared buffers are filled and used within this context, and not valid after it.

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
        """A copy of a model gets its own buffers and streams; with weights elsewhere it cannot be copied."""
        return Shared, (self.device, self.streamed)


@dataclass
class BatchContext:
    """What all layers share of one batch."""

    segments: Segments
    attention: Backend
    dtype: torch.dtype
    """The type of weights and activations; the residual stream keeps its own."""
    shared: Shared
    fast: tuple[bool, bool] = (True, True)
    """Whether sums in fp8 are fast, forward and backward."""
    has_positions: bool = False
    cosine: torch.Tensor = field(init=False)
    """(positions, head size); token m has row m modulo its length."""
    sine: torch.Tensor = field(init=False)

    def set_positions(self, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Set the rotary table, (1 or batch, length, head size). The backbone passes it to every layer; the first one sets it."""
        if not self.has_positions:
            self.cosine, self.sine = cosine.flatten(0, 1).contiguous(), sine.flatten(0, 1).contiguous()
            self.has_positions = True

    def tiles(self, policy: str) -> list[slice]:
        """The tokens' rows in parts of nearly equal length."""
        tokens, largest = self.segments.tokens, tile(policy, self.segments.tokens)
        step = -(-tokens // -(-tokens // largest))
        return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


@dataclass(frozen=True)
class LayerCall:
    """One use of a layer."""

    layer: FusedLayer
    number: int
    """The layer's, in the backbone."""
    batch: BatchContext
    tiles: Sequence[slice]
    policy: str | None
    """None where there will be no backward."""
    seed: int
    """Determines every dropout mask of this call."""
    fp8: frozenset[str] = frozenset()
    """The groups that are computed in fp8."""

    @property
    def operations(self) -> Operations:
        return self.batch.shared.operations

    @functools.cached_property
    def products(self) -> Mapping[str, Product[Any]]:
        """The product of each group."""
        return {name: self._product(name, index) for index, name in enumerate(GROUPS)}

    def _product(self, name: str, index: int) -> Product[Any]:
        batch, shared, group = self.batch, self.batch.shared, self.layer.groups[name]
        slot = slots(len(self.tiles))[name]
        if name not in self.fp8:
            return AugmentedProduct(group, shared.workspace, slot, batch.dtype, index, self.seed)
        return Fp8Product(
            group, shared.workspace, shared.operations, slot, batch.dtype, index, self.seed,
            peaks=shared.peaks, fast=batch.fast,
        )  # fmt: skip

    def empty(self, rows: slice, width: int) -> torch.Tensor:
        """An empty (m, width) for a tile."""
        return torch.empty((rows.stop - rows.start, width), dtype=self.batch.dtype, device=self.batch.shared.device)


@dataclass
class SavedActivations:
    """Activations between forward and backward; those that are None are recomputed."""

    x_mh: torch.Tensor | OffloadedTensor | None = None
    qkv: torch.Tensor | None = None
    """(m, q + k + v), rotated"""
    attended: torch.Tensor | None = None
    """The output of attention, (m, heads, head size)"""
    attention_state: BackendState = ()
    """What else the backward of attention needs."""
    sum_mh: torch.Tensor | None = None
    """The residual stream after attention."""
    gate_up: Any = None
    """gate and up, (m, 2 i), in the gradient buffer of their product; backward overwrites them with their gradients."""
    ranks: SavedRanks = field(default_factory=dict)

    def for_one_backward(self) -> SavedActivations:
        """A copy that one backward may use up. It lacks gate and up, which backward overwrites, so they are recomputed."""
        return dataclasses.replace(self, gate_up=None, ranks=dict(self.ranks))
