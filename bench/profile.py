"""Where a training step's time goes: kernels by kind on the device, functions on the host, and how long each was idle.

python -m bench.profile DIR --data FILE option=value ...       the options of bench/train.py's rows

The device is profiled over two consecutive steps, so that its idle time between them is seen too.
"""

from __future__ import annotations

import argparse
import cProfile
import pathlib
import pstats
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback

from bench.train import build
from bench.train_rows import options_of

WARM_UP, PROFILED = 4, 2
KINDS = {
    "products": ("gemm", "cutlass", "nvjet", "splitK", "cublas"),
    "attention": ("flash", "fmha", "cudnn", "sdpa"),
    "dequantise": ("_dequantize",),
    "adapters": ("_pack",),
    "norm, rotary, SwiGLU": ("_forward", "_backward"),
    "cross-entropy": ("_cross_entropy",),
    "optimiser": ("kOptimizer", "multi_tensor", "Optimizer"),
    "copies": ("Memcpy", "copy"),
}


class StepProfiler(TrainerCallback):  # type: ignore[misc]
    """Profiles the steps after the warm-up: first the host, then the device, so that neither disturbs the other."""

    def __init__(self) -> None:
        self.host = cProfile.Profile()
        self.device: torch.profiler.profile | None = None
        self.plain: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the profiler of this step."""
        if self.device is not None:
            return
        torch.cuda.synchronize()
        if state.global_step == WARM_UP + PROFILED:
            self.host.enable()
        if state.global_step == WARM_UP + 2 * PROFILED:  # two consecutive steps, with the time between them
            self.device = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.device.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the profiler of this step."""
        if self.device is not None and state.global_step <= WARM_UP + 2 * PROFILED + 1:
            return
        queued = time.perf_counter() - self.began
        torch.cuda.synchronize()
        done = time.perf_counter() - self.began
        if WARM_UP < state.global_step <= WARM_UP + PROFILED:
            self.plain.append(done)
            print(f"step {done * 1e3:.1f} ms; the host had queued it after {queued * 1e3:.1f} ms")
        if state.global_step == WARM_UP + 2 * PROFILED:
            self.host.disable()
        if self.device is not None:
            self.device.__exit__(None, None, None)


def kind_of(name: str) -> str:
    """The kind, a line of the table, that a kernel belongs to."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def main() -> None:
    """Parse, train a few steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("options", nargs="*", metavar="option=value")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    given = parser.parse_intermixed_args()
    profiler = StepProfiler()
    options = {**options_of(given.options), "steps": WARM_UP + 2 * PROFILED + 1}
    trainer, _ = build(given.folder, given.data, options, [profiler])
    trainer.train()
    pstats.Stats(profiler.host, stream=sys.stdout).sort_stats("tottime").print_stats(32)
    assert profiler.device is not None
    kernels = [event for event in profiler.device.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print_kernels(kernels)
    print_idle(kernels)


def print_kernels(kernels: list[Any]) -> None:
    """Time and launches a step, by kind and by name."""
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in kernels:
        spent = (kernel.time_range.end - kernel.time_range.start) / 1e3 / PROFILED
        times[kind_of(kernel.name)] += spent
        counts[kind_of(kernel.name)] += 1 / PROFILED
        names[kernel.name][0] += spent
        names[kernel.name][1] += 1 / PROFILED
    print(f"one step: {sum(times.values()):.1f} ms of kernels in {sum(counts.values()):.0f} launches")
    for kind, spent in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {kind:24}{spent:9.2f} ms {counts[kind]:6.0f}")
    for name, (spent, count) in sorted(names.items(), key=lambda item: -item[1][0])[:24]:
        print(f"    {spent:8.2f} ms {count:6.0f}  {name[:110]}")


def print_idle(kernels: list[Any]) -> None:
    """The time in which the device was idle: in all, by length, and between which kernels the longest gaps were."""
    kernels = sorted(kernels, key=lambda kernel: kernel.time_range.start)
    gaps: list[tuple[float, float, str, str]] = []
    busy_until, last = kernels[0].time_range.end, kernels[0].name
    for kernel in kernels[1:]:
        idle = kernel.time_range.start - busy_until
        if idle > 0:
            gaps.append((idle, busy_until - kernels[0].time_range.start, last, kernel.name))
        if kernel.time_range.end > busy_until:
            busy_until, last = kernel.time_range.end, kernel.name
    whole = busy_until - kernels[0].time_range.start
    print(f"{PROFILED} steps took {whole / 1e3:.1f} ms, idle {sum(gap[0] for gap in gaps) / 1e3:.1f} ms of it:")
    for least, most in ((0, 5), (5, 50), (50, 500), (500, float("inf"))):
        lengths = [gap[0] for gap in gaps if least < gap[0] <= most]
        print(f"  gaps of {least} to {most} us {len(lengths):6}{sum(lengths) / 1e3:9.2f} ms")
    for idle, at, before, after in sorted(gaps, reverse=True)[:16]:
        print(f"  {idle:8.0f} us at {at / 1e3:8.1f} ms, between {before[:50]} and {after[:50]}")


if __name__ == "__main__":
    main()
