"""Layer inputs on pinned host memory between forward and backward, copied beside the computation."""

from __future__ import annotations

import collections
import weakref

import torch

IN_FLIGHT = 2  # inputs whose copy may still run: the third layer waits for the first's


class OffloadedTensor:
    """One layer's input, away from the device."""

    def __init__(self, shape: torch.Size, pinned: torch.Tensor, before: OffloadedTensor | None) -> None:
        self.shape = shape
        self.pinned = pinned
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.fetched: tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Stream] | None = None

    def __del__(self) -> None:
        """A backward that stopped halfway: nobody may write where the copy still does."""
        if self.fetched is not None:
            _, event, stream = self.fetched
            stream.wait_event(event)


class ActivationOffload:
    """Puts tensors away in forward and brings them back in backward, the next one while the last is worked on.

    All waiting is between streams; the host never waits. Pinned buffers are kept for the next step. Threads may have a stream
    each: memory goes back to the stream that asked for it, so that is the one that waits for a copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._free: list[torch.Tensor] = []
        self._leaving: collections.deque[tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Stream]] = collections.deque()
        self._last: weakref.ref[OffloadedTensor] | None = None

    def put(self, x: torch.Tensor) -> OffloadedTensor:
        """Copy a contiguous tensor to the host; the caller lets go of it."""
        stream, current = self._copying(), torch.cuda.current_stream(self.device)
        before = self._last() if self._last is not None else None
        offloaded = OffloadedTensor(x.shape, self._pinned(x), before)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            offloaded.pinned[: x.numel()].copy_(x.flatten(), non_blocking=True)
            self._leaving.append((x, stream.record_event(), current))
        # The tensor's memory may be used anew only after its copy: this stream waits, and then the reference goes.
        while len(self._leaving) > IN_FLIGHT:
            self._arrive()
        self._last = weakref.ref(offloaded)
        return offloaded

    def take(self, offloaded: OffloadedTensor, *, again: bool = False) -> torch.Tensor:
        """The tensor, back on the device; the copy of the layer before begins.

        Args:
            offloaded: what `put` gave.
            again: it will be taken once more, so its buffer stays its own.
        """
        while self._leaving:
            self._arrive()
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
        before = offloaded.before()
        self._last = weakref.ref(before) if before is not None else None
        if before is not None and before.fetched is None:
            self._fetch(before)
        return x

    def _arrive(self) -> None:
        _, event, stream = self._leaving.popleft()
        stream.wait_event(event)

    def _fetch(self, offloaded: OffloadedTensor) -> None:
        stream, current = self._copying(), torch.cuda.current_stream(self.device)
        x = torch.empty(offloaded.shape, dtype=offloaded.pinned.dtype, device=self.device)
        stream.wait_stream(current)  # whoever had this memory before is done with it
        with torch.cuda.stream(stream):
            x.copy_(offloaded.pinned[: x.numel()].view(offloaded.shape), non_blocking=True)
            offloaded.fetched = (x, stream.record_event(), current)

    def _pinned(self, x: torch.Tensor) -> torch.Tensor:
        """A buffer of at least the tensor's size; one that is too small makes way."""
        while self._free:
            buffer = self._free.pop()
            if buffer.dtype == x.dtype and buffer.numel() >= x.numel():
                return buffer
        return torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)

    def _copying(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream
