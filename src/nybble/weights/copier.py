"""Copies from the host to a device beside the computation: what runs them, and what orders the two.

`sharded.py` has another `Copier`, which gathers what is spread over ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from nybble.distributed.group import group_size
from nybble.distributed.launcher import local_size
from nybble.errors import EngineError
from nybble.plan.free_memory import host_memory
from nybble.weights.packed import PackedLayer, StoredLayer, origin_of, packed_bytes

Mark = Any
"""A point in the order of the device's work; an event on a GPU."""


class Copier(Protocol):
    """Queues copies. Copies and computation wait for each other's marks on the device; the host never waits."""

    device: torch.device
    where: str
    """Where the weights are that it copies, for messages."""
    unaffected: str
    """What works all the same with the modules that had the weights, for messages."""
    ranks: int
    """How many ranks must copy together; 1 for one that copies alone."""

    def all_ranks(self, number: int) -> int:
        """The sum of a number over these ranks."""

    def pack(self, layers: Sequence[Sequence[torch.nn.Module]]) -> Iterator[StoredLayer]:
        """Move the weights of each layer's linear modules to where copies read them, one layer after another.

        Raises:
            EngineError: there is not enough memory; the layer that it was needed for is still where it was.
        """

    def device_buffer(self, size: int) -> torch.Tensor:
        """(size,) uint8 on the device, into which copies can be queued."""

    def mark(self) -> Mark:
        """The end of the computation that is queued now."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Mark) -> Mark:
        """Queue a copy that starts once the computation has reached a mark; returns the copy's end."""

    def wait(self, copied: Mark, target: torch.Tensor) -> None:
        """Whatever is computed from now on waits for the end of a copy into this buffer."""


class CudaCopier:
    """Copies from pinned memory on a stream of their own."""

    where, ranks, unaffected = "on the host", 1, "state_dict() and save_pretrained work as they are"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def all_ranks(self, number: int) -> int:
        return number

    def pack(self, layers: Sequence[Sequence[torch.nn.Module]]) -> Iterator[StoredLayer]:
        return pack_on_host(layers, pinned_buffers)

    def device_buffer(self, size: int) -> torch.Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        buffer.record_stream(self._stream)  # once it is freed, its memory is not reused while a copy still writes to it
        return buffer

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        copied: torch.cuda.Event = self._stream.record_event()
        return copied

    def wait(self, copied: torch.cuda.Event, target: torch.Tensor) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        target.record_stream(current)  # threads may have streams of their own


def pack_on_host(
    layers: Sequence[Sequence[torch.nn.Module]], allocate: Callable[[Sequence[int]], Iterable[torch.Tensor]]
) -> Iterator[StoredLayer]:
    """Move layers into buffers on the host.

    Args:
        layers: the linear modules of each.
        allocate: makes a buffer (size,) uint8 for each size.

    Raises:
        EngineError: the host does not have enough memory; nothing was moved.
    """
    sizes = [packed_bytes(modules) for modules in layers]
    # What is on the host already is freed as it moves; only one block of it exists twice.
    come_from_host = bool(layers) and origin_of(layers[0]).type == "cpu"
    check_host_memory(max(map(sum, blocks_of(sizes)), default=0) if come_from_host else sum(sizes))
    for modules, buffer in zip(layers, allocate(sizes), strict=True):
        yield PackedLayer(modules, buffer)


def check_host_memory(needed: int) -> None:
    """Pinned memory cannot be swapped out: without this check, the system would end the process.

    Args:
        needed: bytes that this process, and each other one of this machine, takes more than now.

    Raises:
        EngineError: there is not enough.
    """
    processes = local_size() or group_size()
    free = host_memory().free // processes
    if needed > free:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise EngineError(
            f"the weights of the decoder layers take {needed / 1e9:.2f} GB more of host memory, and {free / 1e9:.2f} GB is "
            f"free{each}",
            fix="free host memory, or leave the weights on the device if they fit there (engine.weights=device)",
        )


def pinned_buffers(sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    """A buffer (size,) uint8 of pinned memory for each size.

    Raises:
        EngineError: it cannot be allocated.
    """
    for block in blocks_of(sizes):
        try:
            whole = torch.empty(sum(block), dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise EngineError(
                f"{sum(block) / 1e9:.2f} GB of pinned host memory cannot be allocated: {str(error).splitlines()[0]}",
                fix="free host memory, or leave the weights on the device if they fit there (engine.weights=device)",
            ) from error
        yield from whole.split(block)


LARGEST_BLOCK = 1 << 33
"""Bytes: 19 of Llama 2 70B's layers fill 98% of it; with twice as much, 38 would fill as much."""


def blocks_of(sizes: Sequence[int]) -> list[list[int]]:
    """Buffers, in their order, in blocks that are allocated at once and nearly fill a power of two.

    Torch rounds pinned memory up to a power of two: layer by layer, Llama 2 13B's 163 MB would take 268 MB each. Weights that
    come from the host exist twice while a block is filled, so a block is not made larger than needed for that.

    Args:
        sizes: of the buffers, in bytes.
    """
    blocks: list[list[int]] = []
    left = list(sizes)
    while left:
        most = min(LARGEST_BLOCK, 1 << (sum(left).bit_length() - 1))
        fitting = sum(total <= most for total in itertools.accumulate(left))
        blocks.append(left[: max(1, fitting)])
        left = left[len(blocks[-1]) :]
    return blocks
