"""How fast training will be, roughly: its arithmetic over the speed of this device's matrix products."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from nybble.plan.shapes import ModelShape

PRODUCTS = 2.5
"""Forward, gradient of the input, and half of the forward again: the base is frozen and has no other gradient."""
# Training's share of a plain product's rate.
# H200, 4 x 2,048 of a 7B: 13,213 to 18,265 tokens/s, 0.6 to 0.85; two cores, SmolLM2: 227, 0.28.
EFFICIENCY = {"cuda": 0.6, "cpu": 0.3}
BURSTS, SECONDS, PAUSE = 6, 0.05, 0.1
"""How often products are measured, for how long, and seconds between: another process may have the cores at one moment."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second that training may reach."""

    free: float
    """With the machine to itself, within a factor of two."""
    now: float
    """Under its current load."""

    @property
    def is_busy(self) -> bool:
        """Whether other programs use the machine."""
        return self.now < 0.7 * self.free


def estimate(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, processes: int = 1) -> Speed:
    """How fast QLoRA of this model may train on this device; processes share a CPU, and have a GPU each."""
    linears = ModelShape.from_config(config.to_dict()).parameters.linears
    products = product_rates(device, dtype)
    share = EFFICIENCY[device.type] / (PRODUCTS * 2 * linears)
    share *= processes if device.type == "cuda" else 1
    return Speed(share * max(products), share * statistics.median(products))


def product_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Floating-point operations a second of a large matrix product, measured at several moments; the fastest product of each."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    _wait(device)
    return [2 * size**3 / _fastest(left, right) for _ in range(BURSTS)]


def _fastest(left: torch.Tensor, right: torch.Tensor) -> float:
    time.sleep(PAUSE)
    took: list[float] = []
    burst = time.perf_counter()
    while not took or time.perf_counter() - burst < SECONDS:
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(left.device)
        took.append(time.perf_counter() - began)
    return min(took)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
