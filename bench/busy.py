"""What waiting threads cost: training alone and next to busy processes, with each way to wait, in turns on the same cores.

    PYTHONPATH=src python -m bench.busy [--cores 0,1] [--busy 2] [--seconds 5] [--rounds 3]

The model has SmolLM2-135M's shape, random weights in NF4 and nybble's fused layers; a step is 256 tokens. There is one
process for each way to wait; it stays loaded and works only while it is measured. Speed is counted in passes through
layers, so that a step that takes minutes need not end. Prints medians, as tokens/s and as shares of the library's default
alone and of the same way alone.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.cli.app import silence_libraries
from nybble.engine.fuse import fuse
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.model.device import choose_dtype
from nybble.recipe import LoraOptions, ModelOptions

WAYS: dict[str, dict[str, str]] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}} | {
    f"spin {count:,}": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 10_000, 30_000, 100_000)
}
TOKENS, LAYERS, BACKWARD = 256, 30, 1.5  # a backward pass costs about one and a half forward passes


def train(folder: str) -> None:
    """Train for as many seconds as each line of standard input says, and answer each with tokens/s."""
    silence_libraries()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model_folder = pathlib.Path(folder) / "model"
    if not model_folder.exists():
        config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
                             num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model_folder)
    device = torch.device("cpu")
    dtype, _ = choose_dtype("auto", device)
    base = load_base(find_checkpoint(str(model_folder), None), ModelOptions(), dtype, device, pathlib.Path(folder))
    model = attach_adapter(base.model, LoraOptions())
    fuse(model)
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-4, fused=True)
    done, deadline = 0.0, float("inf")

    def count(passes: float) -> None:
        nonlocal done
        done += passes
        if time.perf_counter() > deadline:
            raise TimeoutError

    def went_forward(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        count(1)
        output.register_hook(lambda gradient: count(BACKWARD))

    for layer in model.base_model.model.model.layers:
        layer.register_forward_hook(went_forward)
    ids = torch.arange(TOKENS)[None] * 97 % 49152

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        done, began = 0.0, time.perf_counter()
        deadline = began + float(line)
        try:
            while True:
                step()
        except TimeoutError:
            print(done * TOKENS / (LAYERS * (1 + BACKWARD)) / (time.perf_counter() - began), flush=True)


def main() -> None:
    """Load a process for each way to wait, one after another, then measure them in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")})
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    rates: dict[tuple[str, bool], list[float]] = {(way, busy): [] for way in WAYS for busy in (False, True)}
    workers: dict[str, subprocess.Popen[str]] = {}
    loops: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for way, variables in WAYS.items():
                command = [sys.executable, "-c", "import sys; from bench.busy import train; train(sys.argv[1])", folder]
                workers[way] = subprocess.Popen(
                    command, env={**clean, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                if ask(workers[way]) != "ready":
                    sys.exit(f"the process for {way} failed; see above")
            for _ in range(options.rounds):
                for busy in (False, True):
                    if busy:
                        loop = [sys.executable, "-c", "while True: pass"]
                        loops += [subprocess.Popen(loop) for _ in range(options.busy)]
                    for way, worker in workers.items():
                        rates[way, busy].append(float(ask(worker, f"{options.seconds}\n")))
                    while loops:
                        end(loops.pop())
        finally:
            for process in [*workers.values(), *loops]:
                end(process)
    cores = sorted(os.sched_getaffinity(0))
    print(
        f"{options.rounds} rounds of {options.seconds:g} s on cores {cores}; busy: next to {options.busy} busy processes"
    )
    print(f"{'':14}{'alone':>8}{'of default':>12}{'busy':>10}{'of alone':>10}   tokens/s of each round, alone | busy")
    median = {key: statistics.median(measured) for key, measured in rates.items()}
    for way in WAYS:
        alone, beside_busy = median[way, False], median[way, True]
        each = " | ".join(" ".join(f"{rate:.1f}" for rate in rates[way, busy]) for busy in (False, True))
        share = alone / median["default", False]
        print(f"{way:14}{alone:8.1f}{share:12.1%}{beside_busy:10.1f}{beside_busy / alone:10.1%}   {each}")


def ask(worker: subprocess.Popen[str], line: str = "") -> str:
    """Send a line to a worker and return its answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(line)
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a process and wait until it has ended."""
    process.kill()
    process.wait()


if __name__ == "__main__":
    main()
