"""Layer inputs in pinned host memory between forward and backward, copied while the device computes."""

from __future__ import annotations

import collections
import weakref

import torch

IN_FLIGHT = 2  # inputs whose copies may still run: the third layer waits for the first layer's


class OffloadedTensor:
    """The input of one layer, stored on the host."""

    def __init__(self, shape: torch.Size, pinned: torch.Tensor, previous: OffloadedTensor | None) -> None:
        self.shape = shape
        self.pinned = pinned
        self.previous = weakref.ref(previous) if previous is not None else lambda: None
        self.fetched: tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Stream] | None = None

    def __del__(self) -> None:
        """After a backward that stopped halfway: the memory may not be reused while the copy still writes to it."""
        if self.fetched is not None:
            _, event, stream = self.fetched
            stream.wait_event(event)


class ActivationOffload:
    """Moves tensors to the host in forward and back in backward; the next one is copied while the device works on the last.

    All waiting is between streams; the host never waits. Pinned buffers are kept for the next step. Threads may use different
    streams: memory returns to the stream that allocated it, so that stream waits for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._free: list[torch.Tensor] = []
        self._copies: collections.deque[tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Stream]] = collections.deque()
        self._last: weakref.ref[OffloadedTensor] | None = None

    def put(self, x: torch.Tensor) -> OffloadedTensor:
        """Copy a contiguous tensor to the host; the caller drops its reference."""
        stream, current = self._copy_stream(), torch.cuda.current_stream(self.device)
        previous = self._last() if self._last is not None else None
        offloaded = OffloadedTensor(x.shape, self._pinned_buffer(x), previous)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            offloaded.pinned[: x.numel()].copy_(x.flatten(), non_blocking=True)
            self._copies.append((x, stream.record_event(), current))
        # The tensor's memory may be reused only after its copy: this stream waits, and then the reference is dropped.
        while len(self._copies) > IN_FLIGHT:
            self._finish_copy()
        self._last = weakref.ref(offloaded)
        return offloaded

    def take(self, offloaded: OffloadedTensor, *, again: bool = False) -> torch.Tensor:
        """The tensor, back on the device; the copy of the previous layer's input starts.

        Args:
            offloaded: what `put` returned.
            again: whether it will be taken once more, so that its buffer is not reused yet.
        """
        while self._copies:
            self._finish_copy()
        if offloaded.fetched is None:
            self._fetch(offloaded)
        assert offloaded.fetched is not None
        x, event, _ = offloaded.fetched
        offloaded.fetched = None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        x.record_stream(current)  # it may have been fetched for a thread on another stream
        if not again:
            self._free.append(offloaded.pinned)
        previous = offloaded.previous()
        self._last = weakref.ref(previous) if previous is not None else None
        if previous is not None and previous.fetched is None:
            self._fetch(previous)
        return x

    def _finish_copy(self) -> None:
        _, event, stream = self._copies.popleft()
        stream.wait_event(event)

    def _fetch(self, offloaded: OffloadedTensor) -> None:
        stream, current = self._copy_stream(), torch.cuda.current_stream(self.device)
        x = torch.empty(offloaded.shape, dtype=offloaded.pinned.dtype, device=self.device)
        stream.wait_stream(current)  # until the previous user of this memory is done with it
        with torch.cuda.stream(stream):
            x.copy_(offloaded.pinned[: x.numel()].view(offloaded.shape), non_blocking=True)
            offloaded.fetched = (x, stream.record_event(), current)

    def _pinned_buffer(self, x: torch.Tensor) -> torch.Tensor:
        """A buffer of at least the tensor's size; buffers that are too small are dropped."""
        while self._free:
            buffer = self._free.pop()
            if buffer.dtype == x.dtype and buffer.numel() >= x.numel():
                return buffer
        return torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)

    def _copy_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
