"""The frozen weights of one decoder layer in one buffer on the host: one copy brings them all to the device.

The layers' own parameters and bitsandbytes' states become views of that buffer, so nothing of them is left on the device, while
state dicts, saving and whatever else reads the model find every number in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from nybble.kernels.reference import Nested
from nybble.plan.ledger import aligned
from nybble.weights.frozen import FrozenWeight, states
from nybble.weights.moving import stay


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
        self.origin = next(owner for module in modules for owner, _ in _places(module)).device
        self.starts: dict[int, int] = {}
        self.pack()

    def pack(self) -> None:
        """Move the weights into the buffer, from wherever they are."""
        self._watched: list[torch.Tensor] = []
        start = 0
        for owner, name in [place for module in self.modules for place in _places(module)]:
            tensor = getattr(owner, name)
            with _mode_of(owner, name):
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
        """Move the weights to a device, each into memory of its own; the buffer is not used any more.

        Raises:
            torch.OutOfMemoryError: they do not fit there; they are back in the buffer.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.pack)
            move_weights(self.modules, device, copy=True)
            undo.pop_all()
        for module in self.modules:
            del module._apply

    def versions(self) -> tuple[int, ...]:
        """Version counters that show what was written into the weights (load_state_dict does)."""
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(0 if tensor.is_inference() else tensor._version for tensor in self._watched)

    def copied(self, weight: FrozenWeight, copy: torch.Tensor) -> FrozenWeight:
        """A weight whose tensors are all in the buffer, as it is in a copy of the buffer."""

        def find(tensor: torch.Tensor) -> torch.Tensor:
            return _view(copy, self.starts[tensor.data_ptr()], tensor)

        nested = weight.nested
        return dataclasses.replace(
            weight,
            stored=find(weight.stored),
            absmax=find(weight.absmax),
            code=None if weight.code is None else find(weight.code),
            nested=nested and Nested(find(nested.code), find(nested.absmax), find(nested.offset), nested.blocksize),
        )


def move_weights(modules: Sequence[torch.nn.Module], device: torch.device, *, copy: bool = False) -> None:
    """Move the weights of linear layers to a device, even if they are there already where a copy is asked for."""
    for module in modules:
        for owner, name in _places(module):
            with _mode_of(owner, name):
                setattr(owner, name, getattr(owner, name).to(device, copy=copy))


@contextlib.contextmanager
def _mode_of(owner: Any, name: str) -> Iterator[None]:
    """The mode in which a tensor was made: one of torch.inference_mode stays one, or its parameter could not be read any more."""
    tensor = owner if name == "data" else getattr(owner, name)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def packed_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Bytes of the buffer for the weights of linear layers."""
    return sum(aligned(getattr(owner, name).nbytes) for module in modules for owner, name in _places(module))


def _places(module: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a linear layer's weight has its tensors: owner and attribute."""
    yield module.weight, "data"
    if isinstance(module, Linear4bit):
        for state in states(module.weight):
            yield from ((state, name) for name in ("absmax", "code", "offset") if getattr(state, name) is not None)


def _view(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """The part of a buffer of bytes that has the size, type and shape of a tensor."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _part_of_its_own(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """As `_view`, with a storage of its own over the same memory: torch and safetensors refuse to save tensors of different types
    that share one."""
    part = torch.from_numpy(buffer.numpy()[start : start + like.nbytes])
    return part.view(like.dtype).view(like.shape)
