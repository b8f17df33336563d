"""A rough estimate of training speed: its arithmetic divided by the speed of this device's matrix products."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from nybble.plan.shapes import ModelShape

PASSES = 2.5
"""A training step's products, in forward passes: forward, input gradient, and half of the forward again. The frozen base has no
weight gradient."""
# The share of a plain product's rate that training reaches.
# H200, 4 x 2,048 of a 7B: 13,213 to 18,265 tokens/s, 0.6 to 0.85; two cores, SmolLM2: 227, 0.28.
EFFICIENCY = {"cuda": 0.6, "cpu": 0.3}
BURSTS, SECONDS, PAUSE = 6, 0.05, 0.1
"""How often products are measured, for how long, and the seconds between: another process may use the cores at one moment."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second that training may reach."""

    idle: float
    """With the machine to itself, within a factor of two."""
    current: float
    """Under the machine's current load."""

    @property
    def is_busy(self) -> bool:
        """Whether other programs use the machine."""
        return self.current < 0.7 * self.idle


def estimate(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, processes: int = 1) -> Speed:
    """How fast QLoRA of this model may train on this device; processes share a CPU but have a GPU each."""
    linears = ModelShape.from_config(config.to_dict()).parameters.linears
    rates = product_rates(device, dtype)
    tokens_per_operation = EFFICIENCY[device.type] / (PASSES * 2 * linears)
    tokens_per_operation *= processes if device.type == "cuda" else 1
    return Speed(tokens_per_operation * max(rates), tokens_per_operation * statistics.median(rates))


def product_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Floating-point operations per second of a large matrix product: the fastest product of each of several measurements."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    _wait(device)
    return [2 * size**3 / _fastest(left, right) for _ in range(BURSTS)]


def _fastest(left: torch.Tensor, right: torch.Tensor) -> float:
    time.sleep(PAUSE)
    durations: list[float] = []
    burst_start = time.perf_counter()
    while not durations or time.perf_counter() - burst_start < SECONDS:
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(left.device)
        durations.append(time.perf_counter() - start)
    return min(durations)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
