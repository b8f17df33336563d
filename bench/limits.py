"""Training under enforced limits of GPU memory: what fits, how, and how fast, beside the same work without a limit.

    python -m bench.limits TOKENIZER DATA llama-2-7b 2.9 4.5 6 8 12 0 [llama-3-8b 3.3 0 ...]
        [--batch 4] [--length 2048] [--steps 5] [--warm-up 2]

Numbers after a model are limits in 1e9 bytes, 0 for none. Each row is what `--vram` makes of the same recipe (rank 16 on all
linear layers, so many rows a step); the limit is enforced by torch.cuda.set_per_process_memory_fraction before anything is moved
to the GPU. Weights are random and made on the host, so a 70B needs no files but 36 GB of memory, and 9 GB more while they move
to pinned memory. Give limits in ascending order: a model whose weights once came to the GPU stays there. Tokens/s after the
warm-up; memory is max_memory_reserved.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.random_model import random_llama
from bench.train import Clock, counted_tokens, dense, trainer_of
from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.model.adapter.lora import attach_adapter
from nybble.model.device import grow_segments
from nybble.plan.known_models import KNOWN
from nybble.plan.placing import Option, Rows, as_written, changed, fastest
from nybble.recipe import Recipe, load_recipe

LINK = 1 << 30  # bytes that are copied to measure the link to the host


def recipe_of(batch: int, length: int) -> Recipe:
    """The recipe of every row."""
    return load_recipe(None, [
        "model.path=m", "data.path=d", "lora.r=16", "lora.alpha=16", "lora.dropout=0", f"train.micro_batch={batch}",
        "train.accumulation=1", "train.optimizer=paged_adamw_8bit", "train.scheduler=constant", "train.warmup=0",
        f"data.max_length={length}", "data.validation=0",
    ])  # fmt: skip


def link_rate() -> float:
    """GB/s from pinned host memory to the GPU."""
    host, device = (
        torch.empty(LINK, dtype=torch.uint8, pin_memory=True),
        torch.empty(LINK, dtype=torch.uint8, device="cuda"),
    )
    device.copy_(host)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(4):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * LINK / 1e9 / (time.perf_counter() - began)


def rows_of(name: str, limits: list[float], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build a model once, and train it under each limit."""
    shape, recipe = KNOWN[name].shape, recipe_of(given.batch, given.length)
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    data = dense(tokenizer, given.data, given.length, given.batch * (given.steps + 2))
    model = attach_adapter(random_llama(shape), recipe.lora)
    built = time.perf_counter() - began
    for limit in limits:
        size = int(limit * 1e9) or None
        option = as_written(recipe, shape, None, Rows()) if size is None else fastest(recipe, shape, size, Rows())
        row = {"model": name, "rows": given.batch, "length": given.length, "limit": limit, "built_s": round(built, 1)}
        if option is None:
            yield row | {"failed": "nothing fits"}
            continue
        try:
            yield row | train(model, tokenizer, changed(recipe, option.changes), option, data, given, size)
        except torch.OutOfMemoryError as error:
            yield row | {"changes": option.changes, "failed": str(error).splitlines()[0]}
        model.zero_grad(set_to_none=True)


def train(
    model: Any, tokenizer: Any, recipe: Recipe, option: Option, data: Any, given: argparse.Namespace, limit: int | None
) -> dict[str, Any]:
    """One row."""
    engine = recipe.engine
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    if engine.weights == "device":  # else fuse leaves them where they are, on the host
        unfuse(model).to("cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit / total)
    torch.cuda.reset_peak_memory_stats()
    fuse(
        model, engine.policy, embedding=engine.embedding, weights=engine.weights, resident_layers=engine.resident_layers
    )  # fmt: skip
    result = fusion(model)
    assert result is not None, "it was fused just now"
    result.budget.chunked_loss = True
    moved = torch.cuda.max_memory_reserved()
    clock = Clock(given.steps)
    trainer = trainer_of(model, tokenizer, recipe, data, given.steps, torch.bfloat16, [clock])
    tokens = counted_tokens(trainer)
    started = time.perf_counter()
    trainer.train()
    first = given.warm_up * (len(tokens) // given.steps)
    seconds = clock.marks[-1] - (clock.marks[given.warm_up - 1] if given.warm_up else started)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "changes": option.changes, "policies": result.policy_counts(), "fallen_back": result.fallen_back,
        "planned_gb": round(option.prediction.peak.total / 1e9, 2), "moved_gb": round(moved / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2), "tok_s": round(sum(tokens[first:]) / seconds),
        "step_s": [round(after - before, 2) for before, after in zip(clock.marks, clock.marks[1:], strict=False)],
        "standing": result.last.cached_layers, "loss": [round(losses[0], 4), round(losses[-1], 4)] if losses else None,
    }  # fmt: skip


def main() -> None:
    """Parse and print, a JSON line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("work", nargs="+", help="models, each with its limits")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    given = parser.parse_args()
    assert 0 <= given.warm_up < given.steps, "steps remain after the warm-up"
    work: dict[str, list[float]] = {}
    for word in given.work:
        if word in KNOWN:
            latest = work.setdefault(word, [])
        else:
            latest.append(float(word))
    grow_segments()
    print(json.dumps({"device": torch.cuda.get_device_name(), "link_gb_s": round(link_rate(), 1)}), flush=True)
    for name, limits in work.items():
        for row in rows_of(name, limits, given):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
