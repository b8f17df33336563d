"""Free memory of this machine and its GPUs, as it is now."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import psutil
import torch

CGROUP = pathlib.Path("/sys/fs/cgroup")  # of the container that this process is in, if any (cgroup v2)


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory."""

    free: int
    total: int


def host_memory(cgroup: pathlib.Path = CGROUP) -> Memory:
    """The machine's, or what its container may use where that is less.

    Files that the kernel caches for a container count as used by it; what it would drop for the asking counts as free here,
    as it does on a machine.
    """
    machine = psutil.virtual_memory()
    limit, used, details = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        total = min(int(most), machine.total)
        taken = int(used.read_text()) - _inactive_files(details)
        return Memory(max(0, min(total - taken, machine.available)), total)
    return Memory(machine.available, machine.total)


def device_memory(device: torch.device | str) -> Memory:
    """A GPU's, to any process; the host's for a CPU."""
    device = torch.device(device)
    return Memory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else host_memory()


def allocatable_bytes(device: torch.device, slack: float = 0.0) -> int:
    """What this process may still allocate on a GPU, up to its limit; blocks that its allocator has at hand included.

    Args:
        device: the GPU.
        slack: share of the limit that is left alone.
    """
    memory = device_memory(device)
    limit = int(memory.total * torch.cuda.get_per_process_memory_fraction(device))
    usable = min(memory.free + torch.cuda.memory_reserved(device), limit)
    return int(usable - slack * limit) - torch.cuda.memory_allocated(device)


def _inactive_files(details: pathlib.Path) -> int:
    """Bytes of cached files that nobody has used for a while."""
    lines = details.read_text().splitlines() if details.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
