"""The classic recipe on the Llama-2-7B shape: weights in memory, training peak and speed, on a card limited to so many GB.

    python -m bench.llama2_7b prepare DIR TOKENIZER_DIR        random weights (bfloat16, 13.5 GB) with Llama 2's tokenizer
    python -m bench.llama2_7b train DIR DATA [limit_gb=12] [option=value ...]

`train` runs nybble.train on recipes/llama2-7b-alpaca.yaml with DIR and DATA in place of the Hub's. Any option of the recipe
can be overridden. It prints one JSON line. Speed and memory do not depend on the values of the weights. limit_gb is
enforced by torch.cuda.set_per_process_memory_fraction: what does not fit fails. The peak is torch.cuda's
max_memory_reserved in 1e9 bytes over training, including the loaded base.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import statistics
import sys
import tempfile

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.recipe import load_recipe
from nybble.run.log import read_metrics
from nybble.training.train import train

RECIPE = pathlib.Path(__file__).parents[1] / "recipes" / "llama2-7b-alpaca.yaml"
WARM_UP = 3  # steps left out of the speed: compilation and the allocator's growth


def prepare(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """Write the model unless it exists."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=4096, pad_token_id=None, dtype=torch.bfloat16)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="5GB")
    for file in tokenizer.glob("*"):
        shutil.copy(file, folder)


def measure(folder: pathlib.Path, data: pathlib.Path, limit_gb: float | None, options: list[str]) -> dict[str, object]:
    """One run, as a row of the table."""
    if limit_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(limit_gb * 1e9 / total)
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [
            f"model.path={folder}",
            f"data.path={data}",
            f"out={scratch}/run",
            "data.validation=0",
            "train.max_steps=12",
        ]
        recipe = load_recipe(RECIPE, [*fixed, *options])
        run = train(recipe, console=Console(stderr=True))
        summary = json.loads((run.folder / "summary.json").read_text())
        steps = [line for line in read_metrics(run) if line.tokens is not None][WARM_UP:]
    return {
        "quantization": recipe.model.quantization,
        "targets": recipe.lora.targets,
        "micro_batch": recipe.train.micro_batch,
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing,
        "checkpointing": recipe.train.gradient_checkpointing,
        "limit_gb": limit_gb,
        "weights_gb": round(summary["base"]["bytes"] / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "tokens_per_second": round(sum(s.tokens for s in steps) / sum(s.seconds for s in steps)),
        "median_step_s": round(statistics.median(s.seconds for s in steps), 3),
        "loss": round(summary["train_loss"], 4),
        "device": summary["device"],
        "versions": summary["versions"],
        "date": summary["date"],
    }


def main(arguments: list[str]) -> None:
    """Parse and print."""
    if not arguments or arguments[0] not in ("prepare", "train"):
        sys.exit(__doc__)
    first, second, *rest = arguments[1:]
    if arguments[0] == "prepare":
        prepare(pathlib.Path(first), pathlib.Path(second))
        return
    limits = [float(option.partition("=")[2]) for option in rest if option.startswith("limit_gb=")]
    options = [option for option in rest if not option.startswith("limit_gb=")]
    print(json.dumps(measure(pathlib.Path(first), pathlib.Path(second), limits[0] if limits else None, options)))


if __name__ == "__main__":
    main(sys.argv[1:])
