"""Training speed and memory, compared with other tools: every row in a process of its own on one card, one table at the end.

    python -m bench.train prepare DIR TOKENIZER_DIR
    python -m bench.train table DIR --data instruct_mix.jsonl [--peers peers.py] [--rows TEXT ...] [--json FILE]
        [--side-by-side 6] [--steps 10]
    python -m bench.train row DIR --data FILE option=value ...        one row, as a JSON line

`prepare` writes a random model of Llama 2 7B's shape in NF4 with double quantisation: speed and memory do not depend on
the values. Several rows load side by side, and one trains at a time. A row trains LoRA on all linear layers with 8-bit AdamW
through nybble's own trainer, in whole optimiser steps. The first three steps are left out of the speed. Tokens are counted
without padding. "reserved" is max_memory_reserved in 1e9 bytes, the base included. A row in which a layer fell back is marked:
it says nothing about the engine. `--rows` selects the rows whose names contain one of the texts.

`--peers` is a script that measures other tools on the same work; each run prints one line, RESULT and JSON. Options of a row:

    work=dense|packed|padded  batch=4  length=2048  policy=auto|...|plain|compiled  r=16  dtype=bfloat16|float16
    embedding=device|host  weights=device|host  limit=GB  steps=10
    compute=bf16|fp8  skip=down_proj,layers.0  fast=forward|backward|both|none
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from bench.gate import Row
from bench.train_rows import DEFAULTS, PEERS, ROWS, options_of
from nybble.data.batches import Collator
from nybble.data.sets.prepare import prepare as prepare_data
from nybble.engine.fuse import fuse, fusion
from nybble.errors import NybbleError
from nybble.model.adapter.lora import attach_adapter
from nybble.model.device import grow_segments
from nybble.objective.supervised import Supervised
from nybble.plan.schedule import Schedule
from nybble.recipe import Recipe, load_recipe
from nybble.training.arguments import training_arguments
from nybble.training.optimizer import make_optimizer
from nybble.training.trainer import QLoraTrainer

LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
}
WARM_UP = 3  # steps, in which kernels are compiled and the allocator grows
TIMEOUT = 900  # seconds after which a row has failed


def prepare(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """Write the model in 16 bits and in NF4, unless they exist."""
    if (folder / "nf4" / "config.json").exists():
        return
    config = LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096, pad_token_id=None, dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    loaded_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model.save_pretrained(folder / "bf16")
    del model
    torch.cuda.empty_cache()
    storage = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder / "bf16", device_map={"": 0}, dtype=torch.bfloat16, quantization_config=storage
    )
    model.save_pretrained(folder / "nf4")
    for kind in ("bf16", "nf4"):
        loaded_tokenizer.save_pretrained(folder / kind)


def dense(tokenizer: Any, data: pathlib.Path, length: int, count: int) -> Dataset:
    """Blocks of one length from real text, every token trained."""
    rows = [json.loads(line) for line in data.open()]
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}</s>" for row in rows]
    ids = list(itertools.chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    ids *= -(-length // len(ids))
    blocks = len(ids) // length
    return Dataset.from_list([
        {"input_ids": ids[n % blocks * length :][:length], "trained": [True] * length, "length": length}
        for n in range(count)
    ])  # fmt: skip


class Clock(TrainerCallback):  # type: ignore[misc]
    """Records when each step ended, and how many kernels the last one launched."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[float] = []
        self.launches = 0
        self.profiler: torch.profiler.profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Profile the last step instead of timing it, except in rows with a memory limit."""
        if state.global_step == self.steps:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device and record the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            self.launches = sum(event.count for event in self.profiler.key_averages() if event.key in LAUNCHES)


def build(
    folder: pathlib.Path, data: pathlib.Path, options: dict[str, Any], callbacks: list[TrainerCallback]
) -> tuple[QLoraTrainer, list[int]]:
    """A row's trainer, and a list that grows by the number of tokens of each step."""
    grow_segments()
    if options["limit"]:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options["limit"] * 1e9 / total)
    dtype, steps, batch = getattr(torch, options["dtype"]), options["steps"], options["batch"]
    packed = options["work"] == "packed"
    recipe = load_recipe(None, [
        f"model.path={folder}", f"data.path={data}", f"lora.r={options['r']}", f"lora.alpha={options['r']}",
        "lora.targets=all-linear", "lora.dropout=0", f"train.micro_batch={batch}", "train.accumulation=1",
        "train.optimizer=adamw_8bit", "train.scheduler=constant", "train.warmup=0", "train.learning_rate=2e-4",
        f"data.max_length={options['length'] if packed else 1024}", "data.validation=0",
        "data.template=alpaca", "data.overlength=drop", f"data.packing={packed}",
    ])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "nf4")
    if options["work"] == "dense":
        rows: Any = dense(tokenizer, data, options["length"], batch * (steps + 2))
    else:
        with tempfile.TemporaryDirectory() as cache:
            rows = prepare_data(recipe.data, tokenizer, 0, pathlib.Path(cache), lambda _: None).train
    place = "cpu" if options["weights"] == "host" else torch.device("cuda", 0)  # from there `fuse` streams them
    model = AutoModelForCausalLM.from_pretrained(folder / "nf4", device_map={"": place}, dtype=dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = dtype
    model.config.use_cache = False
    model.requires_grad_(False)
    model = attach_adapter(model, recipe.lora)
    plain = options["policy"] in ("plain", "compiled")
    if options["policy"] == "compiled":
        for layer in model.get_base_model().model.layers:
            layer.compile()
    if not plain:
        fuse(
            model, options["policy"], embedding=options["embedding"], weights=options["weights"],
            compute=options["compute"], fp8_skip=[name for name in options["skip"].split(",") if name],
            fp8_fast=options["fast"],
        )  # fmt: skip
        fusion(model).budget.chunked_loss = True
    trainer = trainer_of(model, tokenizer, recipe, rows, steps + (not options["limit"]), dtype, callbacks, plain=plain)
    return trainer, counted_tokens(trainer)


def trainer_of(
    model: Any, tokenizer: Any, recipe: Recipe, rows: Any, steps: int, dtype: torch.dtype, callbacks: list[TrainerCallback], *,
    plain: bool = False,
) -> QLoraTrainer:  # fmt: skip
    """nybble's trainer for so many steps, without evaluation and saving."""
    schedule = Schedule(steps, 10**6, 10**6, 0)
    arguments = training_arguments(
        recipe, pathlib.Path(tempfile.mkdtemp()), schedule, torch.device(model.device.type), dtype,
        has_validation=False, checkpointing=plain,
    )  # fmt: skip
    arguments.save_strategy = "no"
    optimizer = make_optimizer(model, recipe.train.optimizer, dtype, 2e-4, recipe.train.weight_decay)
    return QLoraTrainer(
        objective=Supervised(), optimizer=optimizer, model=model, args=arguments, train_dataset=rows,
        data_collator=Collator(0, flatten=not plain), processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip


def counted_tokens(trainer: QLoraTrainer) -> list[int]:
    """A list that grows by the number of tokens of each micro batch, padding left out."""
    tokens: list[int] = []
    inner = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        trainer.current_step.clear()
        return inner(model, inputs, *rest)

    trainer.training_step = counted
    return tokens


def measure(folder: pathlib.Path, data: pathlib.Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train one row and return its result."""
    steps = options["steps"]
    clock = Clock(steps)
    trainer, tokens = build(folder, data, options, [clock])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    first = min(WARM_UP, steps - 1)
    seconds = clock.marks[steps - 1] - clock.marks[first - 1]
    timed = tokens[first:steps]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    done = fusion(trainer.model)
    return {
        **options,
        "tok_s": round(sum(timed) / seconds),
        "step_s": round(seconds / len(timed), 4),
        "step_ms": [round(1e3 * (after - before), 1) for before, after in itertools.pairwise(clock.marks[:steps])],
        "reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "allocated_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "launches": clock.launches,
        "attention": "sdpa" if done is None else done.last.attention,
        "fused": 0 if done is None else done.fused,
        "fallen_back": 0 if done is None else done.fallen_back,
        "policies": None if done is None else done.policy_counts(),
        "standing": 0 if done is None else done.last.cached_layers,
    }


def run(wave: list[Row]) -> Iterator[dict[str, Any]]:
    """Load rows side by side and train them one after another. A row that fails is recorded with its last line of output."""
    for row in wave:
        row.start()
    for row in wave:
        row.read("READY")
    for row in wave:
        result, errors = row.train(), row.error_output()
        yield {
            "name": row.name,
            **(json.loads(result) if result else {"failed": errors.strip().splitlines()[-1:], "log": errors}),
        }


def rows_of(
    folder: pathlib.Path, data: pathlib.Path, peers: pathlib.Path | None, selected: list[str], steps: int
) -> list[Row]:
    """The rows of nybble and of other tools whose names contain one of the texts; `steps` is for rows that set none."""
    common = ["row", str(folder), "--data", str(data)]
    rows = [
        Row(
            f"nybble {name}",
            [__file__, *common, *(f"{key}={value}" for key, value in {"steps": steps, **own}.items())],
            TIMEOUT,
        )
        for name, own in ROWS
    ]
    if peers is not None:
        rows += [
            Row(name, [str(peers), "train", *own.split(), f"steps={steps}", f"dir={folder}"], TIMEOUT)
            for name, own in PEERS
        ]
    return [row for row in rows if not selected or any(text in row.name for text in selected)]


def table(rows: list[Row], side_by_side: int, file: pathlib.Path | None) -> None:
    """Run the rows, then print the table."""
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
    }
    done: list[dict[str, Any]] = []
    for first in range(0, len(rows), side_by_side):
        for result in run(rows[first : first + side_by_side]):
            done.append(result)
            print(json.dumps(result), flush=True)
            if file is not None:
                file.write_text(json.dumps({**about, "rows": done}, indent=1) + "\n")
    print(f"{'':58}{'tokens/s':>10}{'GB':>8}{'loss':>9}  attention")
    for row in done:
        if "failed" in row:
            print(f"{row['name']:58}  failed: {row['failed']}")
            continue
        note = f"  {row['fallen_back']} LAYERS FELL BACK" if row.get("fallen_back") else ""
        shown = row.get("attention") or row.get("attn")
        print(f"{row['name']:58}{row['tok_s']:>10,}{row['reserved_GB']:>8.2f}{row['loss'][-1]:>9.4f}  {shown}{note}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "table", "row"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--side-by-side", type=int, default=6, help="rows that load at once; they train one at a time")
    parser.add_argument("--steps", type=int, default=DEFAULTS["steps"], help="optimiser steps per row")
    given = parser.parse_intermixed_args()
    if given.command == "prepare":
        prepare(given.folder, pathlib.Path(given.arguments[0]))
    elif given.command == "table":
        rows = rows_of(given.folder, given.data, given.peers, given.rows, given.steps)
        table(rows, given.side_by_side, given.json)
    else:
        try:
            print("RESULT " + json.dumps(measure(given.folder, given.data, options_of(given.arguments))), flush=True)
        except NybbleError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
