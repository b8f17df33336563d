"""Which home of the fused operations a device gets: the kernels or their reference, with the reason."""

from __future__ import annotations

from types import ModuleType

import torch

from nybble.engine import reference

try:
    from nybble.engine import kernels
except ImportError as error:  # torch for CPUs brings no Triton, and needs none
    kernels, MISSING = None, str(error)  # type: ignore[assignment]


def choose(device: torch.device) -> tuple[ModuleType, str]:
    """The module that holds the operations for tensors on a device, and why this one."""
    if device.type != "cuda":
        return reference, f"plain torch: Triton's kernels do not run on {device.type}"
    if kernels is None:
        return reference, f"plain torch: {MISSING}; pip install triton"
    return kernels, "Triton kernels"
