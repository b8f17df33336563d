"""What one rank of bench/scale.py does: `torchrun ... -m bench.scale_rank TOKENIZER DATA OPTIONS FOLDER`, with options as JSON.

It imports, says so by a file in FOLDER, and begins once there is another. The first rank prints RESULT and a JSON line. Every
rank makes the same random model on its host, layer by layer.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, TrainerCallback

from bench.judging import PLAIN, judging_trainer, pairs
from bench.random_model import random_llama
from bench.train import Clock, counted_tokens, dense, trainer_of
from nybble.data.sets.prepare import prepare
from nybble.distributed.group import all_gather, all_reduce_number
from nybble.engine.fuse import fuse, fusion
from nybble.model.adapter.lora import attach_adapter
from nybble.model.device import grow_segments
from nybble.plan.known_models import KNOWN
from nybble.recipe import Recipe, load_recipe


def recipe_of(options: dict[str, Any], ranks: int) -> Recipe:
    """Rank 16 on all linear layers; `in_step` micro batches in a step over all ranks, by default one on each."""
    accumulation = max(1, options["in_step"] // ranks)
    return load_recipe(None, [
        "model.path=m", "data.path=d", "lora.r=16", "lora.alpha=16", "lora.dropout=0", f"train.micro_batch={options['batch']}",
        f"train.accumulation={accumulation}", f"train.processes={ranks}", f"train.optimizer={options['optimizer']}",
        "train.scheduler=constant", "train.warmup=0", f"data.max_length={options['length']}", "data.validation=0",
        f"train.objective={options['objective']}",
    ])  # fmt: skip


def reserved(device: torch.device) -> int:
    """The most bytes that torch has reserved on a GPU since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def placed(model: Any, options: dict[str, Any], device: torch.device) -> Any:
    """The model with its weights where the row wants them."""
    if options["weights"] in ("device", "fsdp2"):
        model.to(device)
    if options["limit"]:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options["limit"] * 1e9 / total, device)
    if options["weights"] != "fsdp2":
        fuse(
            model, options["policy"], weights=options["weights"], resident_layers=options["resident"],
            compute=options["compute"],
        )  # fmt: skip
        result = fusion(model)
        assert result is not None, "it was fused just now"
        result.budget.chunked_loss = True
        return model
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return model.train()


class Growth(TrainerCallback):  # type: ignore[misc]
    """Bytes reserved at most in the warm-up, and in all."""

    def __init__(self, device: torch.device, warm_up: int) -> None:
        self.device = device
        self.warm_up = warm_up
        self.at_first = self.in_all = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the peak."""
        self.in_all = reserved(self.device)
        if state.global_step == self.warm_up:
            self.at_first = self.in_all


def rows_of(tokenizer: Any, data: pathlib.Path, options: dict[str, Any], ranks: int) -> Any:
    """Dense rows, or pairs, of all ranks and steps."""
    steps = options["steps"] + 2
    if options["objective"] == "supervised":
        return dense(tokenizer, data, options["length"], options["batch"] * max(ranks, options["in_step"]) * steps)
    tokenizer.chat_template = PLAIN
    with tempfile.TemporaryDirectory() as cache:
        file = pathlib.Path(cache) / "pairs.jsonl"
        made = pairs(tokenizer, data, "short prompts", steps * ranks, options["length"] < 512)
        file.write_text("".join(json.dumps(each) + "\n" for each in made))
        recipe = load_recipe(None, ["model.path=m", f"data.path={file}", "data.max_length=4096", "data.validation=0"])
        return prepare(recipe.data, tokenizer, 0, pathlib.Path(cache), target="pairs").train


def train(model: Any, tokenizer: Any, data: Any, options: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Steps by nybble's trainer."""
    clock, growth = Clock(options["steps"]), Growth(model.device, options["warm_up"])
    if options["objective"] == "supervised":
        trainer = trainer_of(model, tokenizer, recipe, data, options["steps"], torch.bfloat16, [clock, growth])
        tokens = counted_tokens(trainer)
    else:
        trainer, _ = judging_trainer(
            model, tokenizer, recipe, data, options["steps"], live=True, callbacks=[clock, growth]
        )
        tokens = [round(sum(data["length"]) / len(data) * options["batch"])] * options["steps"]  # prompts counted twice
    trainer.train()
    warm = options["warm_up"]
    timed = sum(tokens[warm * len(tokens) // options["steps"] :])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = fusion(model)
    return {
        "tok_s": round(all_reduce_number(timed, model.device) / (clock.marks[-1] - clock.marks[warm - 1])),
        "losses": [round(loss, 5) for loss in losses], "policies": result.policy_counts() if result else "",
        "fallen_back": result.fallen_back if result else 0, "grown_mb": round((growth.in_all - growth.at_first) / 1e6),
    }  # fmt: skip


def train_plainly(model: Any, data: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Steps of Transformers' and PEFT's own forward under FSDP2, with torch's AdamW."""
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=2e-4)
    rank, ranks, batch = torch.distributed.get_rank(), torch.distributed.get_world_size(), options["batch"]
    marks, losses = [], []
    for step in range(options["steps"]):
        first = (step * ranks + rank) * batch
        ids = torch.tensor(data[first : first + batch]["input_ids"], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 5))  # waits for the device
        marks.append(time.perf_counter())
    warm = options["warm_up"]
    tokens = batch * options["length"] * ranks * (options["steps"] - warm)
    return {"tok_s": round(tokens / (marks[-1] - marks[warm - 1])), "losses": losses, "policies": "", "fallen_back": 0}


def main() -> None:
    """Measure one row."""
    tokenizer, data, options = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    folder, rank = pathlib.Path(sys.argv[4]), int(os.environ["RANK"])
    (folder / f"ready-{rank}").touch()
    while not (folder / "begin").exists():
        if not folder.exists():
            sys.exit("the command has ended")
        time.sleep(0.05)
    began = time.perf_counter()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        grow_segments()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = torch.distributed.get_world_size()
    recipe, loaded = recipe_of(options, ranks), AutoTokenizer.from_pretrained(tokenizer)
    rows = rows_of(loaded, data, options, ranks)
    is_plain = options["weights"] == "fsdp2"
    storage = torch.bfloat16 if is_plain else torch.uint8  # torch 2.11's fully_shard refuses integers
    model = attach_adapter(random_llama(KNOWN[options["model"]].shape, storage), recipe.lora)
    built = time.perf_counter() - began
    model = placed(model, options, device)
    moved = reserved(device)
    found = train_plainly(model, rows, options) if is_plain else train(model, loaded, rows, options, recipe)
    memory = all_gather([reserved(device)])
    if rank == 0:
        found |= {"ranks": ranks, "built_s": round(built, 1), "moved_gb": round(moved / 1e9, 2),
                  "reserved_gb": [round(size / 1e9, 2) for size in memory]}  # fmt: skip
        print("RESULT", json.dumps(options | found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
