"""What a shared prompt saves: preference pairs in one packed row, with one prompt for both answers and with one for each.

    python -m bench.branches model=smollm2-135m pairs=2 prompt=300 answer=100 policy=keep-all steps=9

Forward and backward of the decoder layers with random weights in NF4 and an adapter of rank 16, in turns, a JSON line for both.
Seconds are medians: processor time on a CPU (float32), time on a GPU (bfloat16). The head and the loss, which see the
same tokens either way, are left out.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from bench.random_model import random_llama
from nybble.engine.fuse import fuse, fusion
from nybble.model.adapter.lora import attach_adapter
from nybble.plan.known_models import KNOWN
from nybble.plan.policies import LADDER
from nybble.recipe import LoraOptions

DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m", "pairs": 2, "prompt": 300, "answer": 100, "policy": LADDER[-1], "steps": 9,
}  # fmt: skip
WARM_UP = 2


def layouts(pairs: int, prompt: int, answer: int) -> dict[str, torch.Tensor]:
    """position_ids, (1, tokens), of both ways."""
    whole, branch = torch.arange(prompt + answer), torch.arange(prompt, prompt + answer)
    return {
        "shared": torch.cat([whole, branch] * pairs)[None],
        "prompt for each": torch.cat([whole, whole] * pairs)[None],
    }


def model_of(name: str, policy: Any, device: torch.device) -> Any:
    """A fused model with an adapter."""
    base = random_llama(KNOWN[name].shape)
    if device.type == "cpu":
        base.float()
        for module in base.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = torch.float32
    model = attach_adapter(base.to(device), LoraOptions(r=16))
    for part in model.parameters():
        if part.requires_grad:
            torch.nn.init.normal_(part, std=0.01)
    return fuse(model.train(), policy)


def step(backbone: Any, positions: torch.Tensor) -> float:
    """Seconds of forward and backward."""
    is_cuda = positions.is_cuda
    now = time.perf_counter if is_cuda else time.process_time
    ids = torch.ones_like(positions)
    if is_cuda:
        torch.cuda.synchronize()
    start = now()
    out = backbone(input_ids=ids, position_ids=positions).last_hidden_state
    out.backward(torch.ones_like(out))
    if is_cuda:
        torch.cuda.synchronize()
    return now() - start


def main() -> None:
    """Measure and print."""
    given = {**DEFAULTS, **dict(word.split("=", 1) for word in sys.argv[1:])}
    assert given.keys() == DEFAULTS.keys(), f"options are {', '.join(DEFAULTS)}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(given["model"], given["policy"], device)
    backbone, state = model.get_base_model().model, fusion(model)
    rows = {
        name: part.to(device)
        for name, part in layouts(*(int(given[key]) for key in ("pairs", "prompt", "answer"))).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    peaks = dict.fromkeys(rows, 0)
    for number in range(WARM_UP + int(given["steps"])):
        for name, positions in rows.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = step(backbone, positions)
            if number >= WARM_UP:
                seconds[name].append(taken)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
    assert state.fallen_back == 0, state.describe()
    shared, each = (statistics.median(times) for times in seconds.values())
    for name, times in seconds.items():
        spread = [round(min(times), 3), round(statistics.median(times), 3), round(max(times), 3)]
        print(
            json.dumps(
                {"row": name, "tokens": rows[name].numel(), "seconds": spread, "peak_gb": round(peaks[name] / 1e9, 2)}
            )
        )
    print(
        json.dumps(
            {
                "times_as_fast": round(each / shared, 2),
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            }
        )
    )


if __name__ == "__main__":
    main()
