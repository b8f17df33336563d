"""Weights that stay on the host, or spread over ranks: each layer's come to the device while the layer before is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nybble.errors import EngineError
from nybble.kernels.operations import Operations
from nybble.weights.copier import Copier
from nybble.weights.frozen import FrozenWeight
from nybble.weights.lockstep import Lockstep
from nybble.weights.packed import StoredLayer, move_weights, origin_of
from nybble.weights.projections import ProjectionGroup
from nybble.weights.staging import Staging
from nybble.weights.store import Pass, dequantise_all, dequantise_all_e4m3


@dataclass(frozen=True)
class Streaming:
    """How weights are streamed."""

    copier: Copier
    resident_layers: int = 0
    """Layers whose weights stay on the device, spread evenly: the copies of the others have their time too."""


class StreamedStore:
    """Moves the weights of layers to where a copier reads them, and writes them from the copies.

    Args:
        operations: of the device.
        layers: the linear layers of each decoder layer.
        streaming: what copies, and how many layers stay on the device.

    Raises:
        EngineError: there is not enough memory there, or it cannot be pinned; what was moved is back where it was, unless it was
            spread over ranks.
    """

    def __init__(
        self, operations: Operations, layers: Sequence[Sequence[torch.nn.Module]], streaming: Streaming
    ) -> None:
        self._operations = operations
        self.copier, self.device = streaming.copier, streaming.copier.device
        self.layers = [list(modules) for modules in layers]
        self.resident_layers = streaming.resident_layers
        numbers = streamed_numbers(len(layers), streaming.resident_layers)
        self._packed: dict[int, StoredLayer] = {}
        self._resident = sorted(set(range(len(layers))) - set(numbers))
        self._resident_origin = origin_of(self.layers[0])
        with contextlib.ExitStack() as undo, torch.inference_mode(False):  # training may follow
            undo.callback(self.put_back)
            stored = streaming.copier.pack([self.layers[number] for number in numbers])
            for number, layer in zip(numbers, stored, strict=True):
                self._packed[number] = layer
            for number in self._resident:
                move_weights(self.layers[number], self.device)
            self._staging = Staging(self._packed, len(layers), streaming.copier)
            undo.pop_all()
        self._note_addresses()
        alone = self.copier.ranks == 1
        self._lockstep = None if alone else Lockstep(len(layers), self._gather, self.copier.all_ranks)
        self._current: tuple[StoredLayer, torch.Tensor] | None = None

    @property
    def streamed_layers(self) -> int:
        """How many layers' weights do not stay on the device."""
        return len(self._packed)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return self._staging.nbytes

    def begin_layer(self, number: int, passing: Pass) -> None:
        """See `WeightStore.begin_layer`; this layer's weights are on the device until the next layer starts."""
        if self._lockstep is not None:
            self._lockstep.before(number, passing)
        staged = self._staging.begin(number, passing)
        self._current = None if staged is None else (self._packed[number], staged)

    def uneven_passes(self) -> contextlib.AbstractContextManager[None]:
        """Within this context, ranks that share the weights may run different numbers of forward passes without gradients."""
        return contextlib.nullcontext() if self._lockstep is None else self._lockstep.uneven()

    def readable(self, weight: FrozenWeight) -> FrozenWeight:
        """See `WeightStore.readable`.

        Raises:
            EngineError: it was moved or replaced after `nybble.fuse`, and is not on the device.
        """
        tensors = tuple(weight.every_tensor())
        if self._current is not None:
            packed, staged = self._current
            key = (staged.data_ptr(), *(tensor.data_ptr() for tensor in tensors))
            if key not in self._copied and all(tensor.data_ptr() in packed.starts for tensor in tensors):
                self._copied[key] = packed.copied(weight, staged)
            if key in self._copied:
                return self._copied[key]
        if weight.stored.device != self.device:
            raise EngineError(
                "a decoder layer's weight was moved to the host or replaced after nybble.fuse",
                fix="call nybble.fuse again, with the same arguments",
            )
        return weight

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """See `WeightStore.write`; one kernel launch per projection.

        Raises:
            EngineError: a weight was moved or replaced after `nybble.fuse`, and is not on the device.
        """
        dequantise_all(self._operations, map(self.readable, group.frozen), out_nk)

    def write_e4m3(self, group: ProjectionGroup, factor: float, transposed: bool, out: torch.Tensor) -> None:
        """See `WeightStore.write_e4m3`.

        Raises:
            EngineError: see `write`.
        """
        dequantise_all_e4m3(self._operations, map(self.readable, group.frozen), factor, transposed, out)

    def is_resident(self, group: ProjectionGroup) -> bool:
        """See `WeightStore.is_resident`."""
        return self._addresses.isdisjoint(tensor.data_ptr() for tensor in group.stored())

    def remove(self, device: torch.device | None = None) -> None:
        """Move all weights back to the device, or to another.

        Raises:
            EngineError: they do not fit there; all of them are where they were.
        """
        moved: list[StoredLayer] = []
        try:
            for packed in self._packed.values():
                packed.move(device or self.device)
                moved.append(packed)
        except torch.OutOfMemoryError as error:
            for packed in moved:
                packed.pack()
            self._note_addresses()
            size = sum(packed.nbytes for packed in self._packed.values())
            raise EngineError(
                f"the weights of {len(self._packed)} decoder layers, {size / 1e9:.2f} GB, do not fit on the device",
                fix=f"leave the model fused: {self.copier.unaffected}",
            ) from error
        self._packed.clear()

    def put_back(self) -> None:
        """Move all weights to where they came from, after a failure; shares stay, since the other ranks may not have failed."""
        for packed in self._packed.values() if self.copier.ranks == 1 else ():
            packed.move(packed.origin)
        for number in self._resident:
            move_weights(self.layers[number], self._resident_origin)
        self._packed.clear()

    def _note_addresses(self) -> None:
        """Remember where weights are that do not stay on the device; those that were packed again are elsewhere now."""
        self._addresses = {address for packed in self._packed.values() for address in packed.starts}
        self._copied: dict[tuple[int, ...], FrozenWeight] = {}

    def _gather(self, number: int) -> None:
        self._staging.begin(number, "inference")

    def __reduce__(self) -> Any:
        """Refuse copies: their weights would be in memory that no copier knows.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            f"a model whose weights are {self.copier.where} cannot be copied or pickled as a whole",
            fix=f"nybble.unfuse(model) first; {self.copier.unaffected}",
        )


def streamed_numbers(count: int, resident: int) -> list[int]:
    """Which layers are streamed, if some stay on the device: the resident ones are spread evenly.

    Args:
        count: number of layers.
        resident: how many of them stay on the device.
    """
    assert 0 <= resident <= count, f"{resident} of {count} layers cannot stay on the device"
    streamed = count - resident
    return [count * index // streamed for index in range(streamed)]
