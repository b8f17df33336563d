"""Which layers' weights are in the buffers on the device, and when the next layer's are copied there.

Each of the two buffers has the weights of one layer. When a layer starts, the copy of the next one in the order of use is queued
into the buffer that neither of the two needs; it starts when the device has computed all layers before. At the end of a forward
that will be followed by a backward, and at the end of that backward, the two layers needed next are already there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from nybble.plan.ledger import STAGING_BUFFERS
from nybble.weights.copier import Copier, Mark
from nybble.weights.packed import StoredLayer
from nybble.weights.store import Pass


@dataclass
class _Buffer:
    bytes: torch.Tensor
    layer: int | None = None
    versions: tuple[int, ...] = ()
    """Of the layer's weights when the copy was queued."""
    copied: Mark = None


class Staging:
    """Buffers on the device for the weights of layers that are on the host, or spread over ranks.

    Args:
        layers: those layers by number.
        count: all layers of the model.
        copier: of the device.
    """

    def __init__(self, layers: Mapping[int, StoredLayer], count: int, copier: Copier) -> None:
        self._layers = layers
        self._count = count
        self._copier = copier
        size = max((layer.nbytes for layer in layers.values()), default=0)
        with torch.inference_mode(False):  # training may follow
            self._buffers = [_Buffer(copier.device_buffer(size)) for _ in range(min(STAGING_BUFFERS, len(layers)))]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.bytes.nbytes for buffer in self._buffers)

    def begin(self, layer: int, passing: Pass) -> torch.Tensor | None:
        """A layer starts: queue the copies that are missing, and let the computation wait for this layer's.

        Args:
            layer: its number.
            passing: what it is used for, which tells the order of use.

        Returns:
            The layer's weights on the device, valid until the next layer starts; None for a layer that stays on the device.
        """
        for buffer in self._buffers:
            if buffer.layer is not None and buffer.versions != self._layers[buffer.layer].versions():
                buffer.layer = None  # what it has a copy of was written into since
        wanted = self._next(layer, passing)
        for number in wanted:
            if all(buffer.layer != number for buffer in self._buffers):
                self._fill(next(buffer for buffer in self._buffers if buffer.layer not in wanted), number)
        for buffer in self._buffers:
            if buffer.layer == layer:
                self._copier.wait(buffer.copied, buffer.bytes)
                return buffer.bytes
        return None

    def _next(self, layer: int, passing: Pass) -> list[int]:
        """The layers that should be in the buffers, in the order of use."""
        wanted: list[int] = []
        for number in order_of_use(layer, self._count, passing):
            if len(wanted) == len(self._buffers):
                break
            if number in self._layers and number not in wanted:
                wanted.append(number)
        return wanted

    def _fill(self, buffer: _Buffer, number: int) -> None:
        """Queue the copy of a layer's weights; it waits until everything queued so far, which may read the buffer, is done."""
        stored, buffer.layer = self._layers[number], None
        buffer.versions = stored.versions()
        buffer.copied = self._copier.copy(stored.buffer, buffer.bytes[: stored.nbytes], self._copier.mark())
        buffer.layer = number


def order_of_use(layer: int, count: int, passing: Pass) -> Iterator[int]:
    """The layers in the order in which they will probably be used, starting with one that starts now.

    Args:
        layer: its number.
        count: number of layers.
        passing: what it is used for.
    """
    if passing == "backward":  # then comes the next batch
        return itertools.chain(range(layer, -1, -1), range(count))
    after = reversed(range(count)) if passing == "forward" else range(count)
    return itertools.chain(range(layer, count), after)
