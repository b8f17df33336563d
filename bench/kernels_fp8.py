"""fp8's kernels at Llama 2 7B's shapes: time beside what they must read and write, and products beside those in bfloat16.

python -m bench.kernels_fp8 [tokens]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch
from triton.testing import do_bench

from bench.kernels import HEADS, HIDDEN, RANK, SIZE, WIDTH, numbers
from nybble.kernels import triton as kernels
from nybble.kernels.reference import Nested
from nybble.kernels.scaled import E4M3, Balance, ScaledRows
from nybble.plan.ledger import split_columns

GROUPS = {"q, k, v": (HIDDEN, 3 * HIDDEN, 3), "o": (HIDDEN, HIDDEN, 1), "gate, up": (HIDDEN, 2 * WIDTH, 2),
          "down": (WIDTH, HIDDEN, 1)}  # fmt: skip
"""Inputs, outputs and adapters."""


def scaled(rows: int, width: int, ranks: int = RANK) -> ScaledRows:
    """A target for rows."""
    values = torch.empty(rows, width + split_columns(ranks), dtype=E4M3, device="cuda")
    return ScaledRows(numbers(rows, width), values, torch.empty(rows, 1, device="cuda"))


def operations(tokens: int) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Name, bytes that are read and written, and the call."""
    packed, state = bitsandbytes.quantize_4bit(
        numbers(WIDTH, HIDDEN) * 0.02, quant_type="nf4", compress_statistics=True
    )
    nested = Nested(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    stored = (packed, state.absmax, state.code, 64, nested, 256.0)
    size = WIDTH * HIDDEN
    straight = torch.empty(WIDTH, HIDDEN + 48, dtype=E4M3, device="cuda")[:, :HIDDEN]
    across = torch.empty(HIDDEN, WIDTH + 48, dtype=E4M3, device="cuda")[:, :WIDTH]
    sixteen = numbers(WIDTH, HIDDEN + 16)[:, :HIDDEN]
    yield "dequantize to bfloat16", size // 2 + 2 * size, lambda: kernels.dequantize(*stored[:5], sixteen)
    yield "dequantize to e4m3", size // 2 + size, lambda: kernels.dequantize_e4m3(*stored, False, straight)
    yield "dequantize to e4m3, transposed", size // 2 + size, lambda: kernels.dequantize_e4m3(*stored, True, across)
    x, update, norm, total = numbers(tokens, HIDDEN), numbers(tokens, HIDDEN), numbers(HIDDEN), numbers(tokens, HIDDEN)
    rows, n = scaled(tokens, HIDDEN), tokens * HIDDEN
    yield "quantize_rows", 3 * n, lambda: kernels.quantize_rows(rows)
    yield "rms_norm", 5 * n, lambda: kernels.rms_norm(x, norm, 1e-5, rows)
    yield "add_rms_norm", 9 * n, lambda: kernels.add_rms_norm(x, update, norm, 1e-5, total, rows)
    yield "rms_norm_backward", 9 * n, lambda: kernels.rms_norm_backward(update, x, norm, 1e-5, x, rows)
    ranks, up = numbers(tokens, RANK), numbers(WIDTH, RANK)
    balance = Balance(torch.ones(2, device="cuda").view(torch.int32), 0, 8, 8)
    yield "split T", 5 * tokens * RANK, lambda: kernels.split(ranks, balance, rows.scales, rows.values[:, HIDDEN:])
    beside = torch.empty(WIDTH, HIDDEN + 48, dtype=E4M3, device="cuda")[:, HIDDEN:]
    yield "split s B", 5 * WIDTH * RANK, lambda: kernels.split(up, balance, None, beside)
    gate_up, active, change = scaled(tokens, 2 * WIDTH, 2 * RANK), scaled(tokens, WIDTH), numbers(tokens, WIDTH)
    n = tokens * WIDTH
    yield "swiglu", 7 * n, lambda: kernels.swiglu(gate_up.wide, active)
    yield "swiglu_backward", 14 * n, lambda: kernels.swiglu_backward(change, gate_up)
    parts, table = tuple(numbers(tokens, HIDDEN) for _ in range(3)), numbers(2048, SIZE)
    qkv = scaled(tokens, 3 * HIDDEN, 3 * RANK)
    yield (
        "rope_backward",
        5 * tokens * 3 * HEADS * SIZE,
        lambda: kernels.rope_backward(parts, table, table, SIZE, 0, qkv),
    )


def products(tokens: int) -> Iterator[tuple[str, float, dict[str, Callable[[], Any]]]]:
    """Name, operations without those of adapters, and the calls: bfloat16, slow and fast fp8 with the adapters' columns."""
    for name, (inputs, outputs, adapters) in GROUPS.items():
        for direction, (k, n) in {"forward": (inputs, outputs), "backward": (outputs, inputs)}.items():
            wide = k + split_columns(adapters * RANK)
            left, right = (numbers(count, wide).to(E4M3) for count in (tokens, n))
            scales = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")
            out = numbers(tokens, n)
            x, w = numbers(tokens, k + adapters * RANK), numbers(n, k + adapters * RANK)
            yield (
                f"{name} {direction}",
                2.0 * tokens * k * n,
                {
                    "bfloat16": functools.partial(torch.mm, x, w.t(), out=out),
                    "slow": functools.partial(kernels.scaled_product, left, scales[0], right, scales[1], False, out),
                    "fast": functools.partial(kernels.scaled_product, left, scales[0], right, scales[1], True, out),
                },
            )


def microseconds(call: Callable[[], Any]) -> float:
    """Median time on the device."""
    call()
    return float(1e3 * do_bench(call, warmup=10, rep=40, return_mode="median"))


def main() -> None:
    """Print both tables."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    print(f"{tokens} tokens: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| kernel | us | TB/s |")
    print("| --- | --- | --- |")
    for name, size, call in operations(tokens):
        taken = microseconds(call)
        print(f"| {name} | {taken:.1f} | {size / taken / 1e6:.2f} |", flush=True)
    print("| product | bfloat16 us | fp8 slow | fp8 fast | TFLOP/s: bfloat16, slow, fast |")
    print("| --- | --- | --- | --- | --- |")
    for name, work, calls in products(tokens):
        times = [microseconds(call) for call in calls.values()]
        rates = ", ".join(f"{work / each / 1e6:.0f}" for each in times)
        print(f"| {name} | {' | '.join(f'{each:.0f}' for each in times)} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
