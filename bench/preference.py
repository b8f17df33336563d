"""Speed and memory of DPO beside TRL's DPOTrainer: the same base in NF4, adapter, pairs and optimiser; each row in a process.

    python -m bench.preference DIR TOKENIZER_DIR DATA.jsonl [--rows TEXT ...] [--steps 10] [--json FILE] [--tiny]

DIR gets a random model of Llama 2 7B's shape (with --tiny, of 2 small layers, for a CPU). DATA has instruction, input and output;
prompts and answers are pieces of its text. Each row prints one JSON line. Tokens are those of both sequences of a pair, prompt
included twice, however a tool computes them, so that rows compare; TRL's sequences have one or two tokens more. The first three
steps are left out of the speed. A reference is live, computed in each step, or kept: nybble's time for it before the first step
is `reference_s`. Lean rows keep layers' inputs on the host. "reserved" is max_memory_reserved in 1e9 bytes, the base included.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from bench.judging import BETA, PLAIN, RANK, RATE, WORKS, judging_trainer, pairs, shape_of
from bench.random_checkpoint import write
from bench.train import WARM_UP, Clock
from nybble.data.sets.prepare import prepare as prepare_data
from nybble.engine.fuse import fuse, fusion
from nybble.model.adapter.lora import attach_adapter
from nybble.model.device import grow_segments
from nybble.plan.known_models import KNOWN
from nybble.recipe import load_recipe
from nybble.weights.on_cpu import stay_unpacked

TIMEOUT = 900
TOOLS = ("nybble kept", "nybble live", "nybble kept lean", "trl kept", "trl live", "trl kept without checkpointing")
ON_CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
PLACE: Any = torch.device("cuda", 0) if ON_CUDA else "cpu"


def prepare(folder: pathlib.Path, tokenizer: pathlib.Path, tiny: bool) -> None:
    """Write the model in NF4, unless it exists."""
    shape = KNOWN["llama-2-7b"].shape
    if tiny:
        shape = dataclasses.replace(
            shape, hidden=64, intermediate=128, layers=2, heads=4, key_value_heads=4, head_size=16
        )
    write(folder, shape, tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = PLAIN
    loaded.save_pretrained(folder)


def base_of(folder: pathlib.Path) -> Any:
    """The model in NF4."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": PLACE}, dtype=DTYPE)
    model.config.use_cache = False
    stay_unpacked(model)
    return model


def measured(trainer: Any, clock: Clock, tokens: int, steps: int, more: dict[str, Any]) -> dict[str, Any]:
    """Train, and the result; `tokens` are those of a step."""
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    first = min(WARM_UP, steps - 1)
    seconds = (clock.marks[steps - 1] - clock.marks[first - 1]) / (steps - first)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "tok_s": round(tokens / seconds), "step_s": round(seconds, 4), "tokens_of_step": tokens,
        "reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2) if ON_CUDA else None,
        "loss": [round(losses[0], 4), round(losses[-1], 4)], **more,
    }  # fmt: skip


def nybble_row(
    folder: pathlib.Path, file: pathlib.Path, count: int, steps: int, live: bool, policy: str = "auto"
) -> dict[str, Any]:
    """nybble's own trainer and objective."""
    if ON_CUDA:
        grow_segments()
    recipe = load_recipe(None, [
        f"model.path={folder}", f"data.path={file}", f"lora.r={RANK}", f"lora.alpha={RANK}", f"train.micro_batch={count}",
        "train.accumulation=1", f"train.optimizer={'adamw_8bit' if ON_CUDA else 'adamw'}", "train.scheduler=constant",
        "train.warmup=0", f"train.learning_rate={RATE}", "data.max_length=4096", "data.validation=0", "train.objective=dpo",
    ])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = prepare_data(recipe.data, tokenizer, 0, pathlib.Path(tempfile.mkdtemp()), target="pairs").train
    model = base_of(folder)
    model.requires_grad_(False)
    model = attach_adapter(model, recipe.lora)
    fuse(model, policy)
    fusion(model).budget.chunked_loss = True
    clock = Clock(steps)
    trainer, more = judging_trainer(model, tokenizer, recipe, rows, steps, live=live, callbacks=[clock])
    result = measured(trainer, clock, sum(rows["length"]) // steps, steps, more)
    return {**result, "fallen_back": fusion(model).fallen_back, "attention": fusion(model).last.attention}


def trl_row(
    folder: pathlib.Path, file: pathlib.Path, count: int, steps: int, live: bool, checkpointing: bool = True
) -> dict[str, Any]:
    """TRL's DPOTrainer."""
    tokenizer, clock = AutoTokenizer.from_pretrained(folder), Clock(steps)
    rows = Dataset.from_list([json.loads(line) for line in file.open()])
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=count, max_steps=steps, learning_rate=RATE, beta=BETA,
        logging_steps=1, save_strategy="no", report_to="none", bf16=ON_CUDA, use_cpu=not ON_CUDA, max_length=4096,
        optim="adamw_8bit" if ON_CUDA else "adamw_torch", warmup_steps=0, lr_scheduler_type="constant", seed=0,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        precompute_ref_log_probs=not live, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=base_of(folder), args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora,
        callbacks=[clock],
    )  # fmt: skip
    parts = ("prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    tokens = sum(len(row[part]) for row in trainer.train_dataset for part in parts)
    return measured(trainer, clock, tokens // steps, steps, {})


def row(tool: str, work: str, given: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    file = pathlib.Path(tempfile.mkdtemp()) / "pairs.jsonl"
    made = pairs(tokenizer, given.data, work, given.steps, given.tiny)
    file.write_text("".join(json.dumps(each) + "\n" for each in made))
    common = (given.folder, file, shape_of(work, given.tiny)[2], given.steps, "live" in tool)
    if tool.startswith("nybble"):
        return nybble_row(*common, "host" if "lean" in tool else "auto")
    return trl_row(*common, "without" not in tool)


def table(given: argparse.Namespace) -> None:
    """Every row in a process of its own, then a table."""
    found: list[dict[str, Any]] = []
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    common = [str(given.folder), str(given.tokenizer), str(given.data), f"--steps={given.steps}"]
    common += ["--tiny"] if given.tiny else []
    for work, tool in itertools.product(WORKS, TOOLS):
        name = f"{tool}, {work}"
        if given.rows and not any(text in name for text in given.rows):
            continue
        command = [sys.executable, "-m", "bench.preference", *common, "--row", tool, work]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"failed": ended.stderr[-3000:]}
        found.append({"name": name, "device": torch.cuda.get_device_name() if ON_CUDA else "cpu", **versions, **result})
        print(json.dumps(found[-1]), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':32}{'tokens/s':>10}{'GB':>8}{'loss':>9}")
    for each in found:
        if "failed" not in each:
            print(f"{each['name']:32}{each['tok_s']:>10,}{each['reserved_GB'] or 0:>8.2f}{each['loss'][-1]:>9.4f}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", nargs=2, metavar=("TOOL", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    prepare(given.folder, given.tokenizer, given.tiny)
    if given.row:
        print("RESULT " + json.dumps(row(*given.row, given)), flush=True)
    else:
        table(given)


if __name__ == "__main__":
    main()
