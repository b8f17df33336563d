"""The memory of this machine and its GPUs that is free now."""

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
    """The machine's memory, or what its container may use if that is less.

    The kernel counts cached files as used by a container; those that it would drop on demand count as free here, as they do on a
    machine.
    """
    machine = psutil.virtual_memory()
    limit_file, usage_file, details = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit_file.is_file() and usage_file.is_file() and (limit := limit_file.read_text().strip()).isdigit():
        total = min(int(limit), machine.total)
        used = int(usage_file.read_text()) - _inactive_files(details)
        return Memory(max(0, min(total - used, machine.available)), total)
    return Memory(machine.available, machine.total)


def device_memory(device: torch.device | str) -> Memory:
    """A GPU's memory, free to any process; the host's for a CPU."""
    device = torch.device(device)
    return Memory(*torch.cuda.mem_get_info(device)) if device.type == "cuda" else host_memory()


def allocatable_bytes(device: torch.device, slack: float = 0.0) -> int:
    """Bytes that this process may still allocate on a GPU, up to its limit, including blocks that its allocator has reserved.

    Args:
        device: the GPU.
        slack: share of the limit to leave unused.
    """
    memory = device_memory(device)
    limit = int(memory.total * torch.cuda.get_per_process_memory_fraction(device))
    usable = min(memory.free + torch.cuda.memory_reserved(device), limit)
    return int(usable - slack * limit) - torch.cuda.memory_allocated(device)


def _inactive_files(details: pathlib.Path) -> int:
    """Bytes of cached files that have not been used for a while."""
    lines = details.read_text().splitlines() if details.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
