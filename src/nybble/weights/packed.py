"""The frozen weights of one decoder layer in one buffer on the host: one copy brings them all to the device.

The layers' own parameters and bitsandbytes' states become views of that buffer, so nothing of them is left on the device, while
state dicts, saving and whatever else reads the model find every number in its place. `sharded.py` spreads a layer over ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit

from nybble.kernels.reference import Nested
from nybble.plan.ledger import aligned
from nybble.weights.frozen import FrozenWeight, states
from nybble.weights.moving import stay, stop_staying


class StoredLayer(Protocol):
    """The weights of one decoder layer, of which nothing but copies is on the device."""

    buffer: torch.Tensor
    """What copies to the device read."""
    nbytes: int
    """Bytes of such a copy."""
    origin: torch.device
    """Where the weights came from."""
    starts: dict[int, int]
    """Where each tensor starts in a copy, by its address."""

    def pack(self) -> None:
        """Move the weights into the buffer, from wherever they are."""

    def move(self, device: torch.device) -> None:
        """Move the weights to a device, each into memory of its own; the buffer is not used any more.

        Raises:
            torch.OutOfMemoryError: they do not fit there; they are back in the buffer.
        """

    def versions(self) -> tuple[int, ...]:
        """Version counters that show what was written into the weights (load_state_dict does)."""

    def copied(self, weight: FrozenWeight, copy: torch.Tensor) -> FrozenWeight:
        """One of the weights, as it is in a copy."""


class PackedLayer:
    """Moves the weights of linear layers into one buffer on the host.

    Args:
        modules: the linear layers, in 4 or 16 bits; not PEFT's wrappers.
        buffer: (`packed_bytes(modules)`,) uint8 on the host.

    Attributes:
        buffer: the bytes of all weights.
        origin: the device that they came from.
        starts: where each tensor starts in it, by address.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], buffer: torch.Tensor) -> None:
        self.modules = tuple(modules)
        self.buffer = buffer
        self.nbytes = buffer.nbytes
        self.origin = origin_of(modules)
        self.starts: dict[int, int] = {}
        self.pack()

    def pack(self) -> None:
        """See `StoredLayer.pack`."""
        self._watched: list[torch.Tensor] = []
        start = 0
        for owner, name in places(self.modules):
            tensor = getattr(owner, name)
            with mode_of(owner, name):
                part = _part_of_its_own(self.buffer, start, tensor)
                part.copy_(tensor)
                setattr(owner, name, part)
            if name in ("data", "absmax"):
                self._watched.append(owner if name == "data" else part)
            self.starts[part.data_ptr()] = start
            start += aligned(part.nbytes)
        for module in self.modules:
            stay(module)  # Accelerate moves the whole model to its device before training

    def move(self, device: torch.device) -> None:
        """See `StoredLayer.move`."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.pack)
            move_weights(self.modules, device, copy=True)
            undo.pop_all()
        for module in self.modules:
            stop_staying(module)

    def versions(self) -> tuple[int, ...]:
        """See `StoredLayer.versions`."""
        return versions_of(self._watched)

    def copied(self, weight: FrozenWeight, copy: torch.Tensor) -> FrozenWeight:
        """See `StoredLayer.copied`."""
        return in_copy(weight, self.starts, copy)


def versions_of(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Version counters of tensors; 0 for inference tensors, which have none."""
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def in_copy(weight: FrozenWeight, starts: Mapping[int, int], copy: torch.Tensor) -> FrozenWeight:
    """A weight as it is in a buffer of bytes.

    Args:
        weight: the weight.
        starts: where each of its tensors starts in the buffer, by its address.
        copy: the buffer.
    """

    def find(tensor: torch.Tensor) -> torch.Tensor:
        return part_of(copy, starts[tensor.data_ptr()], tensor)

    nested = weight.nested
    return dataclasses.replace(
        weight,
        stored=find(weight.stored),
        absmax=find(weight.absmax),
        code=None if weight.code is None else find(weight.code),
        nested=nested and Nested(find(nested.code), find(nested.absmax), find(nested.offset), nested.blocksize),
    )


def origin_of(modules: Sequence[torch.nn.Module]) -> torch.device:
    """The device of the first module's weight."""
    device: torch.device = next(owner for owner, _ in places(modules)).device
    return device


def move_weights(modules: Sequence[torch.nn.Module], device: torch.device, *, copy: bool = False) -> None:
    """Move the weights of linear layers to a device, even if they are there already where a copy is asked for."""
    for owner, name in places(modules):
        with mode_of(owner, name):
            setattr(owner, name, getattr(owner, name).to(device, copy=copy))


@contextlib.contextmanager
def mode_of(owner: Any, name: str) -> Iterator[None]:
    """The mode in which a tensor was made: one of torch.inference_mode stays one, or its parameter could not be read any more."""
    tensor = owner if name == "data" else getattr(owner, name)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def packed_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Bytes of the buffer for the weights of linear layers."""
    return sum(aligned(getattr(owner, name).nbytes) for owner, name in places(modules))


def places(modules: Sequence[torch.nn.Module]) -> list[tuple[Any, str]]:
    """Where the weights of linear layers have their tensors: owner and attribute."""
    return [place for module in modules for place in _places(module)]


def _places(module: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    yield module.weight, "data"
    if isinstance(module, Linear4bit):
        for state in states(module.weight):
            yield from ((state, name) for name in ("absmax", "code", "offset") if getattr(state, name) is not None)


def part_of(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a buffer of bytes that has the size, type and shape of a tensor."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _part_of_its_own(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """As `part_of`, with a storage of its own over that memory: torch and safetensors refuse to save tensors of different types
    that share one."""
    part = torch.from_numpy(buffer.numpy()[start : start + like.nbytes])
    return part.view(like.dtype).view(like.shape)
