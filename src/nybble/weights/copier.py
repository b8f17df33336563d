"""Copies from the host to a device beside the computation: what runs them, and what orders the two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from nybble.errors import EngineError

Mark = Any
"""A point in the order of the device's work; an event on a GPU."""


class Copier(Protocol):
    """Queues copies. Copies and computation wait for each other's marks on the device; the host never waits."""

    device: torch.device

    def host_buffers(self, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """A buffer (size,) uint8 on the host for each size, from which copies can be queued."""

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

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def host_buffers(self, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        return pinned_buffers(sizes)

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
