"""The rows of bench/train.py's table, and the options of a row."""

from __future__ import annotations

import sys
from typing import Any

DEFAULTS = {
    "work": "dense", "batch": 4, "length": 2048, "policy": "auto", "r": 16, "dtype": "bfloat16", "embedding": "device",
    "weights": "device", "limit": 0.0, "steps": 10, "compute": "bf16", "skip": "", "fast": "both",
}  # fmt: skip
ROWS = [
    ("4 x 2048, memory free", {}),
    ("4 x 2048, auto in 36.9 GB", {"limit": 36.9}),
    ("4 x 2048, keep-all", {"policy": "keep-all"}),
    ("4 x 2048, drop-mlp", {"policy": "drop-mlp"}),
    ("4 x 2048, drop-qkv", {"policy": "drop-qkv"}),
    ("4 x 2048, layer-input", {"policy": "layer-input"}),
    ("4 x 2048, host", {"policy": "host"}),
    ("4 x 2048, plain path", {"policy": "plain"}),
    ("4 x 2048, plain path, torch.compile", {"policy": "compiled"}),
    ("1 x 2048, memory free", {"batch": 1}),
    ("1 x 2048, layer-input", {"batch": 1, "policy": "layer-input"}),
    ("1 x 2048, host, embedding on the host", {"batch": 1, "policy": "host", "embedding": "host"}),
    ("1 x 2048, auto in 4.95 GB, embedding on the host", {"batch": 1, "limit": 4.95, "embedding": "host"}),
    ("1 x 2048, auto in 5.15 GB, embedding on the host", {"batch": 1, "limit": 5.15, "embedding": "host"}),
    (
        "1 x 2048, host, embedding and weights on the host",
        {"batch": 1, "policy": "host", "embedding": "host", "weights": "host"},
    ),
    ("1 x 2048, auto, weights on the host", {"batch": 1, "weights": "host"}),
    ("4 x 2048, auto, weights on the host", {"weights": "host"}),
    (
        "1 x 2048, auto in 3.0 GB, embedding and weights on the host",
        {"batch": 1, "limit": 3.0, "embedding": "host", "weights": "host"},
    ),
    ("8 x 2048, memory free", {"batch": 8}),
    ("8 x 2048, host", {"batch": 8, "policy": "host"}),
    ("4 x 2048, r 64, memory free", {"r": 64}),
    ("4 x 2048, r 64, auto in 37.8 GB", {"r": 64, "limit": 37.8}),
    ("4 x 2048, r 64, host", {"r": 64, "policy": "host"}),
    ("4 x 2048, float16", {"dtype": "float16"}),
    ("instruct_mix packed to 2048, memory free", {"work": "packed", "steps": 40}),
    ("instruct_mix packed to 2048, host", {"work": "packed", "policy": "host", "steps": 40}),
    ("instruct_mix unpacked, 16 rows", {"work": "padded", "batch": 16}),
    ("4 x 2048, fp8, memory free", {"compute": "fp8"}),
    ("4 x 2048, fp8, slow sums in backward", {"compute": "fp8", "fast": "forward"}),
    ("4 x 2048, fp8, slow sums", {"compute": "fp8", "fast": "none"}),
    ("4 x 2048, fp8, down_proj in 16 bits", {"compute": "fp8", "skip": "down_proj"}),
    ("4 x 2048, fp8, keep-all", {"compute": "fp8", "policy": "keep-all"}),
    ("4 x 2048, fp8, layer-input", {"compute": "fp8", "policy": "layer-input"}),
    ("4 x 2048, fp8, host", {"compute": "fp8", "policy": "host"}),
    ("2 x 4096, memory free", {"batch": 2, "length": 4096}),
    ("2 x 4096, fp8, memory free", {"batch": 2, "length": 4096, "compute": "fp8"}),
    ("8 x 2048, fp8, memory free", {"batch": 8, "compute": "fp8"}),
    ("1 x 2048, fp8, memory free", {"batch": 1, "compute": "fp8"}),
    ("4 x 2048, fp8, weights on the host", {"compute": "fp8", "weights": "host"}),
    ("20,000 tokens in 8 GB", {"batch": 1, "length": 20000, "policy": "host", "limit": 8.0, "steps": 3}),
    ("120,000 tokens in 24 GB", {"batch": 1, "length": 120000, "policy": "host", "limit": 24.0, "steps": 2}),
]
PEERS = [
    ("Unsloth 4 x 2048, no checkpointing", "unsloth full ckpt=0"),
    ("Unsloth 4 x 2048, offloaded", "unsloth full ckpt=u"),
    ("Unsloth 1 x 2048, offloaded", "unsloth full ckpt=u bs=1"),
    ("Unsloth 1 x 2048, no checkpointing", "unsloth full ckpt=0 bs=1"),
    ("Unsloth 8 x 2048, offloaded", "unsloth full ckpt=u bs=8"),
    ("Unsloth 8 x 2048, no checkpointing", "unsloth full ckpt=0 bs=8"),
    ("Unsloth 2 x 4096, offloaded", "unsloth full ckpt=u bs=2 seq=4096"),
    ("Unsloth 2 x 4096, no checkpointing", "unsloth full ckpt=0 bs=2 seq=4096"),
    ("Unsloth 4 x 2048, r 64, no checkpointing", "unsloth full ckpt=0 r=64"),
    ("Unsloth 4 x 2048, r 64, offloaded", "unsloth full ckpt=u r=64"),
    ("transformers + PEFT 4 x 2048, checkpointing", "hf full"),
    ("transformers + PEFT + Liger 4 x 2048, checkpointing", "hf-liger full"),
    ("Unsloth instruct_mix unpacked, 16 rows", "unsloth instruct ckpt=u bs=16 seq=1024"),
    ("Unsloth instruct_mix, packing=1", "unsloth instruct ckpt=u packing=1"),
]


def options_of(arguments: list[str]) -> dict[str, Any]:
    """A row's options, from option=value arguments."""
    changes = dict(argument.split("=", 1) for argument in arguments)
    unknown = changes.keys() - DEFAULTS.keys()
    if unknown:
        sys.exit(f"unknown options: {', '.join(unknown)}; the options are {', '.join(DEFAULTS)}")
    return {key: type(value)(changes.get(key, value)) for key, value in DEFAULTS.items()}
