"""Copies between host and device that neither side waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Numbers as a tensor, (numbers,), without waiting for what the device is computing."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in pinned memory; one that comes from a GPU is complete only when its stream has got there."""
    return tensor.to("cpu", non_blocking=True)
