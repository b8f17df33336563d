"""Where a training step's time goes: kernels by kind on the device, functions on the host, and how long each was idle.

python -m bench.profile DIR --data FILE option=value ...       the options of bench/train.py's rows
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
from bench.train import build, options_of
from transformers import TrainerCallback

WARM_UP, LOOKED_AT = 4, 2
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


class Looker(TrainerCallback):  # type: ignore[misc]
    """Profiles the steps after the warm-up: first the host, then the device, so that neither disturbs the other."""

    def __init__(self) -> None:
        self.host = cProfile.Profile()
        self.device: torch.profiler.profile | None = None
        self.plain: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start what this step is for."""
        torch.cuda.synchronize()
        if state.global_step == WARM_UP + LOOKED_AT:
            self.host.enable()
        if state.global_step == WARM_UP + 2 * LOOKED_AT:
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            self.device = torch.profiler.profile(activities=activities)
            self.device.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        queued = time.perf_counter() - self.began
        torch.cuda.synchronize()
        done = time.perf_counter() - self.began
        if WARM_UP < state.global_step <= WARM_UP + LOOKED_AT:
            self.plain.append(done)
            print(f"step {done * 1e3:.1f} ms; the host had queued it after {queued * 1e3:.1f} ms")
        if state.global_step == WARM_UP + 2 * LOOKED_AT:
            self.host.disable()
        if self.device is not None:
            self.device.__exit__(None, None, None)


def kind_of(name: str) -> str:
    """A kernel's line of the table."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def main() -> None:
    """Parse, train a few steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    given = parser.parse_args()
    looker = Looker()
    options = {**options_of(given.words), "steps": WARM_UP + 2 * LOOKED_AT}
    trainer, _ = build(given.folder, given.data, options, [looker])
    trainer.train()
    pstats.Stats(looker.host, stream=sys.stdout).sort_stats("tottime").print_stats(32)
    assert looker.device is not None
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    names: dict[str, tuple[float, int]] = {}
    for event in looker.device.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        times[kind_of(event.key)] += event.self_device_time_total / 1e3
        counts[kind_of(event.key)] += event.count
        names[event.key] = (event.self_device_time_total / 1e3, event.count)
    print(f"one step: {sum(times.values()):.1f} ms of kernels in {sum(counts.values())} launches")
    for kind, spent in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {kind:24}{spent:9.2f} ms {counts[kind]:6}")
    for name, (spent, count) in sorted(names.items(), key=lambda item: -item[1][0])[:24]:
        print(f"    {spent:8.2f} ms {count:6}  {name[:110]}")


if __name__ == "__main__":
    main()
