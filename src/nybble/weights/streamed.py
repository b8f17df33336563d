"""Weights that stay on the host: each layer's are copied to the device while the layer before is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nybble.errors import EngineError
from nybble.kernels.operations import Operations
from nybble.plan.free_memory import host_memory
from nybble.weights.copier import Copier, blocks_of
from nybble.weights.frozen import FrozenWeight
from nybble.weights.packed import PackedLayer, move_weights, packed_bytes
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
    """Moves the weights of layers to the host, and writes them from there.

    Args:
        operations: of the device.
        layers: the linear layers of each decoder layer.
        streaming: what copies, and how many layers stay on the device.

    Raises:
        EngineError: the host does not have enough memory, or it cannot be pinned; what was moved is back where it was.
    """

    def __init__(
        self, operations: Operations, layers: Sequence[Sequence[torch.nn.Module]], streaming: Streaming
    ) -> None:
        self._operations = operations
        self.device = streaming.copier.device
        self.layers = [list(modules) for modules in layers]
        self.resident_layers = streaming.resident_layers
        numbers = streamed_numbers(len(layers), streaming.resident_layers)
        sizes = [packed_bytes(self.layers[number]) for number in numbers]
        come_from_host = bool(sizes) and next(self.layers[numbers[0]][0].parameters()).device.type == "cpu"
        _check_host_memory(sizes, come_from_host=come_from_host)
        self._packed: dict[int, PackedLayer] = {}
        self._resident = sorted(set(range(len(layers))) - set(numbers))
        self._resident_origin = streaming.copier.device
        with contextlib.ExitStack() as undo, torch.inference_mode(False):  # training may follow
            undo.callback(self.put_back)
            for number, buffer in zip(numbers, streaming.copier.host_buffers(sizes), strict=True):
                self._packed[number] = PackedLayer(self.layers[number], buffer)
            self._resident_origin = next((packed.origin for packed in self._packed.values()), self.device)
            for number in self._resident:
                move_weights(self.layers[number], self.device)
            self._staging = Staging(self._packed, len(layers), streaming.copier)
            undo.pop_all()
        self._addresses = {address for packed in self._packed.values() for address in packed.starts}
        self._current: tuple[PackedLayer, torch.Tensor] | None = None
        self._copied: dict[tuple[int, ...], FrozenWeight] = {}

    @property
    def streamed_layers(self) -> int:
        """How many layers' weights are on the host."""
        return len(self._packed)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return self._staging.nbytes

    def begin_layer(self, number: int, passing: Pass) -> None:
        """See `WeightStore.begin_layer`; this layer's weights are on the device until the next layer starts."""
        staged = self._staging.begin(number, passing)
        self._current = None if staged is None else (self._packed[number], staged)

    def write(self, group: ProjectionGroup, out_nk: torch.Tensor) -> None:
        """See `WeightStore.write`; one kernel launch per projection.

        Raises:
            EngineError: a weight was moved or replaced after `nybble.fuse`, and is not on the device.
        """
        dequantise_all(self._operations, map(self._on_device, group.frozen), out_nk)

    def write_e4m3(self, group: ProjectionGroup, factor: float, transposed: bool, out: torch.Tensor) -> None:
        """See `WeightStore.write_e4m3`.

        Raises:
            EngineError: see `write`.
        """
        dequantise_all_e4m3(self._operations, map(self._on_device, group.frozen), factor, transposed, out)

    def is_resident(self, group: ProjectionGroup) -> bool:
        """See `WeightStore.is_resident`."""
        return self._addresses.isdisjoint(tensor.data_ptr() for tensor in group.stored())

    def remove(self, device: torch.device | None = None) -> None:
        """Move all weights back to the device, or to another.

        Raises:
            EngineError: they do not fit there; all of them are where they were.
        """
        moved: list[PackedLayer] = []
        try:
            for packed in self._packed.values():
                packed.move(device or self.device)
                moved.append(packed)
        except torch.OutOfMemoryError as error:
            for packed in moved:
                packed.pack()
            size = sum(packed.buffer.nbytes for packed in self._packed.values())
            raise EngineError(
                f"the weights of {len(self._packed)} decoder layers, {size / 1e9:.2f} GB, do not fit on the device",
                fix="leave the model fused: state_dict() and save_pretrained work as it is",
            ) from error
        self._packed.clear()

    def put_back(self) -> None:
        """Move all weights to where they came from, after a failure."""
        for packed in self._packed.values():
            packed.move(packed.origin)
        for number in self._resident:
            move_weights(self.layers[number], self._resident_origin)
        self._packed.clear()

    def _on_device(self, weight: FrozenWeight) -> FrozenWeight:
        """The weight as the device can read it."""
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
                fix='call nybble.fuse(model, weights="host") again',
            )
        return weight

    def __reduce__(self) -> Any:
        """Refuse copies: their weights would be in memory that no copier knows.

        Raises:
            EngineError: always.
        """
        raise EngineError(
            "a model whose weights are on the host cannot be copied or pickled as a whole",
            fix="nybble.unfuse(model) first; state_dict() and save_pretrained work as they are",
        )


def _check_host_memory(sizes: Sequence[int], *, come_from_host: bool) -> None:
    """Pinned memory cannot be swapped out: without this check, the system would end the process.

    Raises:
        EngineError: there is not enough.
    """
    # What is on the host already is freed as it moves; only one block of it exists twice.
    free, needed = host_memory().free, max(map(sum, blocks_of(sizes)), default=0) if come_from_host else sum(sizes)
    if needed > free:
        raise EngineError(
            f"the weights of the decoder layers take {needed / 1e9:.2f} GB more of host memory, and {free / 1e9:.2f} GB is free",
            fix="free host memory, or leave the weights on the device if they fit there (engine.weights=device)",
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
