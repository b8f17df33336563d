"""How long training will take, roughly: its arithmetic over what this device computes."""

from __future__ import annotations

import time

import torch
from transformers import PretrainedConfig

PRODUCTS = (
    2.5  # forward, gradient of the input, and half of the forward again: the base is frozen and has no other gradient
)
# Of a plain product's rate. H200, 4 x 2,048 of a 7B: 13,213 to 18,265 tokens/s, 0.6 to 0.85; two cores, SmolLM2: 227, 0.28.
EFFICIENCY = {"cuda": 0.6, "cpu": 0.3}
SECONDS = 0.2  # of measuring


def linear_parameters(config: PretrainedConfig) -> int:
    """Parameters of a Llama's linear layers, without embedding and head."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * size + 3 * config.intermediate_size)
    return int(config.num_hidden_layers * layer)


def estimate(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Tokens a second that QLoRA of this model may reach on this device, within a factor of two."""
    return EFFICIENCY[device.type] * product_rate(device, dtype) / (PRODUCTS * 2 * linear_parameters(config))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        torch.mm(left, right)
        _wait(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
