"""Each kernel compared with the same operation compiled by torch, at Llama 2 7B's shapes: time on the device and to launch.

    python -m bench.kernels [tokens ...]

A kernel that is not at least 5% faster than compiled torch, in the sum of its uses in a step, is not worth its lines.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch
from triton.testing import do_bench

from nybble.kernels import reference
from nybble.kernels import triton as kernels
from nybble.kernels.reference import LowRank, Nested

HIDDEN, WIDTH, HEADS, SIZE, VOCABULARY, RANK = 4096, 11008, 32, 128, 32000, 16


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def operations(tokens: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """For each name to show: the operation's name and its arguments."""
    weight = numbers(WIDTH, HIDDEN) * 0.02
    packed, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    matrix = numbers(3 * HIDDEN + 48, HIDDEN + 48)
    adapters = [
        LowRank(numbers(RANK, HIDDEN, dtype=torch.float32), numbers(HIDDEN, RANK, dtype=torch.float32), 1.0, n * HIDDEN, n * RANK)
        for n in range(3)
    ]  # fmt: skip
    x, update, norm = numbers(tokens, HIDDEN), numbers(tokens, HIDDEN), numbers(HIDDEN)
    wide, total = numbers(tokens, HIDDEN + 48)[:, :HIDDEN], numbers(tokens, HIDDEN)
    qkv, table = numbers(tokens, 3 * HIDDEN), numbers(2048, SIZE)
    parts = tuple(numbers(tokens, HIDDEN) for _ in range(3))
    gate_up, active = numbers(tokens, 2 * WIDTH + 32)[:, : 2 * WIDTH], numbers(tokens, WIDTH)
    logits = numbers(1024, VOCABULARY)
    targets = torch.randint(VOCABULARY, (1024,), device="cuda")
    losses = numbers(1024, dtype=torch.float32)
    buffer = numbers(WIDTH, HIDDEN + 32)[:, :HIDDEN]
    return {
        "dequantize 11008 x 4096": ("dequantize", (packed, state.absmax, state.code, 64, nested, buffer)),
        "pack_adapters q, k, v": (
            "pack_adapters",
            (adapters, matrix[: 3 * HIDDEN, HIDDEN:], matrix[3 * HIDDEN :, :HIDDEN]),
        ),
        "rms_norm": ("rms_norm", (x, norm, 1e-5, wide)),
        "add_rms_norm": ("add_rms_norm", (x, update, norm, 1e-5, total, wide)),
        "rms_norm_backward": ("rms_norm_backward", (update, x, norm, 1e-5, x, wide)),
        "rope": ("rope", (qkv, table, table, 2 * HEADS, SIZE, 0)),
        "rope_backward": ("rope_backward", (parts, table, table, SIZE, 0, qkv)),
        "swiglu": ("swiglu", (gate_up, active)),
        "swiglu_backward": ("swiglu_backward", (active, gate_up)),
        "cross_entropy 1024 x 32000": ("cross_entropy", (logits, targets, losses)),
    }


def timed(function: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Microseconds on the device, and on the host for one launch."""
    call = functools.partial(function, *arguments)
    call()
    device = 1e3 * do_bench(call, warmup=5, rep=30, return_mode="median")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        call()
    return device, 1e6 * (time.perf_counter() - began) / 50


def main() -> None:
    """Print the table."""
    for tokens in [int(word) for word in sys.argv[1:]] or [8192]:
        print(f"{tokens} tokens: {torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"{'':28}{'kernel us':>10}{'compiled us':>12}{'ratio':>7}   launch us: kernel, compiled")
        for shown, (name, arguments) in operations(tokens).items():
            ours, our_host = timed(getattr(kernels, name), arguments)
            theirs, their_host = timed(torch.compile(getattr(reference, name), dynamic=False), arguments)
            print(
                f"{shown:28}{ours:10.1f}{theirs:12.1f}{theirs / ours:7.2f}{our_host:15.0f}{their_host:8.0f}", flush=True
            )


if __name__ == "__main__":
    main()
