"""Serving speed on a GPU, by type of weights, way of asking and cache.

    python -m bench.serve DIR [--tokens 64] [--rows TEXT ...] [--json FILE]

Uses what `python -m bench.train prepare DIR TOKENIZER` wrote (random weights of Llama 2 7B's shape, in 16 bits and in NF4),
adds a random adapter, and measures base + adapter in NF4, the same in 16 bits, the adapter merged in 16 bits, and the
merged model with continuous batching. --rows selects the rows whose names contain one of the texts. Columns:

    sequential         four prompts one after another through the pipeline, without a server
    served             16 clients at once through the server with streaming; the median time to their first token
    dynamic, static    a batch of 16 through generate, with a growing cache, and with a static one and compiled steps
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.load import CLIENTS, PROMPTS
from nybble.chat.loading import load_answerers
from nybble.data.text.tokens import encode_text
from nybble.generate.padded import Padded
from nybble.generate.request import Request, complete
from nybble.recipe import ModelOptions
from nybble.run.folder import open_run
from nybble.serve.app import Limits
from nybble.serve.engine import Engine
from nybble.serve.guard import AccessRules
from nybble.serve.loading import load_continuous, pipeline_engine
from nybble.serve.metrics import Metrics
from nybble.serve.server import listen, make_server, short_switch_interval


def bare_adapter(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write a random LoRA adapter of rank 16 on all linear layers, with a tokenizer that has no template of its own."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(base)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    adapted.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    tokenizer.chat_template = None  # a bare adapter then gets Alpaca's template
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def served(engine: Engine, metrics: Metrics) -> Iterator[str]:
    """Run a server around an engine, on the loopback address."""
    listener = listen("127.0.0.1", 0)
    server = make_server(engine, metrics, Limits(), AccessRules(), Console(quiet=True))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with short_switch_interval():
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def measure(
    adapter: pathlib.Path, base: pathlib.Path, tokens: int, *, quantization: str, merged: bool
) -> dict[str, Any]:
    """Measure one type of weights: sequential, served, and the two caches."""
    run = open_run(adapter, str(base))
    options = ModelOptions(path=str(base), quantization=quantization)
    run = type(run)(run.folder, run.recipe.model_copy(update={"model": options}))
    (answerer,) = load_answerers([run], dequantise=True)  # as nybble serve does
    if merged:
        answerer.model.merge_adapter()  # the adapter's layers then compute with the base's weight alone
    prompts = [encode_text(answerer.template, prompt) for prompt in PROMPTS[:CLIENTS]]
    generator = Padded(answerer.model, answerer.tokenizer.pad_token_id)
    stops = answerer.stop_ids()
    with torch.inference_mode():
        complete(generator, [Request(prompts[0], 8, answerer.adapter, stops)])  # loads the kernels
        began = time.perf_counter()
        made = sum(
            len(complete(generator, [Request(prompt, tokens, answerer.adapter, stops)])[0].ids)
            for prompt in prompts[:4]
        )
    row: dict[str, Any] = {"sequential_tok_s": round(made / (time.perf_counter() - began), 1)}
    metrics = Metrics()
    row |= ask_all(pipeline_engine({"tuned": answerer}, "base", metrics, queue=64), metrics, "tuned", tokens)
    for cache in ("dynamic", "static"):
        row[f"{cache}_tok_s"] = batch_speed(answerer, prompts, tokens, cache)
    return row


def measure_continuous(adapter: pathlib.Path, base: pathlib.Path, tokens: int) -> dict[str, Any]:
    """Measure continuous batching, with the base in place of the merged model, which is as fast."""
    merged = adapter / "export" / "merged"
    merged.parent.mkdir(exist_ok=True)
    if not merged.exists():
        merged.symlink_to(base.resolve())
    metrics = Metrics()
    engine = load_continuous([open_run(adapter, str(base))], metrics, device="auto", queue=64)
    return ask_all(engine, metrics, adapter.name, tokens)


def ask_all(engine: Engine, metrics: Metrics, name: str, tokens: int) -> dict[str, Any]:
    """Measure one client, then all of them at once, from a process of their own."""
    with served(engine, metrics) as url:
        options = f"--stream --requests {CLIENTS} --at-once {CLIENTS} --max-tokens {tokens}".split()
        done = subprocess.run(
            [sys.executable, "-m", "bench.load", url, name, *options], capture_output=True, text=True, check=True
        )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def batch_speed(answerer: Any, prompts: list[list[int]], tokens: int, cache: str) -> float | str:
    """Tokens/s of a batch of 16 through generate, after a first one that compiles; or why it failed."""
    model, tokenizer = answerer.model.get_base_model(), answerer.tokenizer
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=model.device)
    settings = {
        "do_sample": False,
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if cache == "static":
        settings["cache_implementation"] = "static"
    try:
        for _ in range(2):
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=(ids != pad).long(), **settings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0][:120]}"
    return round(len(prompts) * tokens / seconds, 1)


ROWS: dict[str, tuple[str, Callable[[pathlib.Path, pathlib.Path, int], dict[str, Any]]]] = {
    "NF4 + adapter": ("nf4", functools.partial(measure, quantization="nf4", merged=False)),
    "16 bits + adapter": ("bf16", functools.partial(measure, quantization="none", merged=False)),
    "16 bits, merged": ("bf16", functools.partial(measure, quantization="none", merged=True)),
    "merged, continuous": ("bf16", measure_continuous),
}
COLUMNS = ["sequential_tok_s", "served_tok_s", "alone_first_token_s", "first_token_s", "dynamic_tok_s", "static_tok_s"]


def table(folder: pathlib.Path, tokens: int, selected: list[str], file: pathlib.Path | None) -> None:
    """Measure the rows, then print the table."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "tokens": tokens, "clients": CLIENTS,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
    }  # fmt: skip
    done: list[dict[str, Any]] = []
    for name, (kind, work) in ROWS.items():
        if selected and not any(text in name for text in selected):
            continue
        base, adapter = folder / kind, folder / f"serve-adapter-{kind}"
        if not (adapter / "adapter_config.json").exists():
            bare_adapter(base, adapter)
        began = time.perf_counter()
        row = {"name": name, **work(adapter, base, tokens)}
        gc.collect()
        if torch.cuda.is_available():
            row["reserved_GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        done.append({**row, "took_s": round(time.perf_counter() - began, 1)})
        print(json.dumps(done[-1]), flush=True)
        if file is not None:
            file.write_text(json.dumps({**about, "rows": done}, indent=1) + "\n")
    print(f"{'':20}" + "".join(f"{column:>22}" for column in COLUMNS))
    for row in done:
        print(f"{row['name']:20}" + "".join(f"{row.get(column, '')!s:>22}" for column in COLUMNS))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    table(given.folder, given.tokens, given.rows, given.json)


if __name__ == "__main__":
    main()
