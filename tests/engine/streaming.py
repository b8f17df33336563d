"""Copiers for a CPU, where weights are streamed from one part of memory to another: at once, or as late as is allowed."""

from __future__ import annotations

import torch

from nybble.weights.copier import pack_on_host


class SynchronousCopier:
    """Copies at once."""

    where, ranks, unaffected = "on the host", 1, "everything else"

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.copies = 0

    def buffers(self, sizes):
        return (torch.empty(size, dtype=torch.uint8) for size in sizes)

    def pack(self, layers):
        return pack_on_host(layers, self.buffers)

    def device_buffer(self, size):
        return torch.full((size,), 255, dtype=torch.uint8, device=self.device)

    def mark(self):
        return None

    def copy(self, source, target, after):
        self.copies += 1
        target.copy_(source)

    def wait(self, copied, target):
        pass


class LateCopier(SynchronousCopier):
    """A device whose copies run as late as is allowed, and whose computation runs as late as is allowed to the copies.

    A copy is done only when somebody waits for it; until then its buffer has garbage. A copy whose mark does not cover the last
    read of its buffer fails: on a device it could run before that.
    """

    def __init__(self):
        super().__init__()
        self.clock = 0
        self.last_read = {}
        self.pending = {}

    def mark(self):
        self.clock += 1
        return self.clock

    def read(self, tensor):
        """The computation reads a tensor."""
        place = tensor.untyped_storage().data_ptr()
        assert place not in self.pending, "read before its copy was waited for"
        self.clock += 1
        self.last_read[place] = self.clock

    def copy(self, source, target, after):
        self.copies += 1
        place = target.untyped_storage().data_ptr()
        assert after > self.last_read.get(place, 0), "filled again before it was read"
        target.fill_(255)
        self.pending[place] = lambda: target.copy_(source)
        return place

    def wait(self, copied, target):
        if copied in self.pending:
            self.pending.pop(copied)()
