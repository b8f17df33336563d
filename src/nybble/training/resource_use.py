"""Time and memory that a run has used."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class ResourceUse:
    """What a run has used, including before it was resumed."""

    started: float
    """When this process started the run or resumed it, in seconds since 1970."""
    earlier: Mapping[str, Any]
    """What it had used before, from the checkpoint that it resumes from; empty for a new run."""

    def so_far(self, device: torch.device) -> dict[str, float]:
        """`seconds`, and `peak_memory` in bytes."""
        seconds, peak = self.earlier.get("seconds", 0.0) + time.time() - self.started, peak_memory(device)
        return {"seconds": round(seconds, 1), "peak_memory": max(peak, int(self.earlier.get("peak_memory", 0)))}


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: what torch has reserved on CUDA, or the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
