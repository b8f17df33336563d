"""Which home of the fused operations a device gets: the kernels or their reference, with the reason."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from nybble.kernels import reference

try:
    from nybble.kernels import triton as kernels

    MISSING = ""
except ImportError as error:  # torch for CPUs brings no Triton, and needs none
    MISSING = str(error)

OPERATIONS = (
    "add_rms_norm", "cross_entropy", "dequantize", "pack_adapters", "product", "rms_norm", "rms_norm_backward", "rope",
    "rope_backward", "swiglu", "swiglu_backward",
)  # fmt: skip
Operations = SimpleNamespace
"""The functions of `reference` by their names, wherever they are computed; a namespace and no module, so that a fused model
can be copied."""


def choose(device: torch.device) -> tuple[Operations, str]:
    """The operations for tensors on a device, and why these."""
    if device.type != "cuda":
        return _of(reference), f"plain torch: Triton's kernels do not run on {device.type}"
    if MISSING:
        return _of(reference), f"plain torch: {MISSING}; pip install triton"
    return _of(kernels), "Triton kernels"


def _of(module: ModuleType) -> Operations:
    return SimpleNamespace(**{name: getattr(module, name) for name in OPERATIONS})
