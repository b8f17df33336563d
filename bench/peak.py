"""What is on the GPU at the peak of a training step, by the line of code that allocated it.

    python -m bench.peak TOKENIZER DATA option=value ...

A few layers of a known shape with random weights are trained for four steps, and the last is recorded. Options, with defaults:

    model=llama-2-7b layers=4 batch=4 length=2048 policy=host embedding=device weights=device r=16
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections import Counter
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from bench.limits import recipe_of
from bench.random_model import random_llama
from bench.train import dense, trainer_of
from nybble.engine.fuse import fuse, fusion
from nybble.model.adapter.lora import attach_adapter
from nybble.model.device import grow_segments
from nybble.plan.known_models import KNOWN
from nybble.plan.placing import changed

DEFAULTS: dict[str, Any] = {
    "model": "llama-2-7b", "layers": 4, "batch": 4, "length": 2048, "policy": "host", "embedding": "device",
    "weights": "device", "r": 16,
}  # fmt: skip
STEPS = 4
OURS = ("nybble/", "bench/", "transformers/", "peft/", "bitsandbytes/", "accelerate/")


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Records the last step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to record."""
        if state.global_step == STEPS - 1:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.memory._record_memory_history(
                enabled="all", context="alloc", stacks="python", max_entries=500_000
            )


def at_peak(trace: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """The most bytes above those at the start, and what they were, by line."""
    live: dict[int, dict[str, Any]] = {}
    total = most = 0
    found: list[dict[str, Any]] = []
    for event in trace:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
        elif event["action"] == "free_requested":
            total -= event["size"]
            live.pop(event["addr"], None)
        if total > most:
            most, found = total, list(live.values())
    lines: Counter[str] = Counter()
    for event in found:
        lines[line_of(event["frames"])] += event["size"]
    return most, lines


def line_of(frames: list[dict[str, Any]]) -> str:
    """The innermost line in a package that matters, and its caller."""
    named = [f"{frame['filename'].split('site/')[-1].split('src/')[-1]}:{frame['line']}" for frame in frames
             if any(part in frame["filename"] for part in OURS)]  # fmt: skip
    return " < ".join(named[:2]) or "elsewhere"


def main(arguments: list[str]) -> None:
    """Parse, train and print."""
    tokenizer_folder, data = pathlib.Path(arguments[0]), pathlib.Path(arguments[1])
    options = DEFAULTS | {
        name: type(DEFAULTS[name])(value) for name, _, value in (word.partition("=") for word in arguments[2:])
    }
    grow_segments()
    recipe = changed(recipe_of(options["batch"], options["length"]), {"lora.r": options["r"]})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = dense(tokenizer, data, options["length"], options["batch"] * (STEPS + 1))
    shape = dataclasses.replace(KNOWN[options["model"]].shape, layers=options["layers"])
    model = attach_adapter(random_llama(shape), recipe.lora)
    if options["weights"] == "device":
        model.to("cuda")
    fuse(model, options["policy"], embedding=options["embedding"], weights=options["weights"])
    result = fusion(model)
    assert result is not None, "it was fused just now"
    result.budget.chunked_loss = True
    recorder = Recorder()
    trainer_of(model, tokenizer, recipe, rows, STEPS, torch.bfloat16, [recorder]).train()
    most, lines = at_peak(torch.cuda.memory._snapshot()["device_traces"][0])
    unit = options["batch"] * options["length"] * shape.hidden * 2
    print(json.dumps(options))
    print(f"at the start {recorder.before:,}, peak {recorder.before + most:,}")
    print(f"torch says {torch.cuda.max_memory_allocated():,}, reserved {torch.cuda.max_memory_reserved():,}")
    print(f"a tensor of the residual stream's size has {unit:,} bytes")
    for line, size in lines.most_common(24):
        print(f"{size:14,} {size / unit:7.2f}  {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
