"""Buffers that steps of all sizes use, one step after another."""

from __future__ import annotations

import math

import torch


class SharedBuffers:
    """Buffers by name, each as large as its largest use; whoever takes the largest first saves the others' memory.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer of a shape; zeros at first, then whatever its last user has left."""
        count = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count:  # who has the smaller one keeps it
            flat = self._flat[name] = torch.zeros(count, dtype=dtype, device=self.device)
        return flat[:count].view(shape)
