"""How fast the decoder answers on a CPU, in turns with the pipeline's padded batches: SmolLM2-135M-Instruct as it is served.

    python -m bench.decode_cpu products [1 2]        the floor: one step's matrix products alone, by rows
    python -m bench.decode_cpu answers [1 2] [5]     tokens/s of both, with so many threads, medians of so many turns
    python -m bench.decode_cpu profile [1] [16]      the operators of the decoder's steps, with so many threads and rows

NF4 weights that were dequantised where they fit, in the type that `auto` chooses, with an adapter of rank 16 on all linear
layers. Prompts of 100 random tokens, answers of 64; nothing is drafted from the prompt. One JSON line for each row.
"""

from __future__ import annotations

import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import linear

from nybble.demo.embedded import unpack
from nybble.files.paths import default_cache
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.decoder.model import read_model
from nybble.generate.padded import Padded
from nybble.generate.request import Generator, Request, Token, complete
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.model.device import choose_dtype
from nybble.recipe import LoraOptions, ModelOptions
from nybble.weights.on_cpu import dequantise_if_it_fits

ROWS = (1, 16)
PROMPT, ANSWER = 100, 64
ADAPTER = "default"
REPEATS = 9


def served_model(cache: pathlib.Path) -> PeftModel:
    """SmolLM2 in the form in which `nybble serve` computes it."""
    folder = unpack(default_cache() / "embedded" / "smollm2-135m-instruct")
    device = torch.device("cpu")
    dtype, _ = choose_dtype("auto", device)
    options = ModelOptions(path=str(folder))
    base = load_base(find_checkpoint(str(folder)), options, dtype, device, cache)
    model = attach_adapter(base.model, LoraOptions())
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.003)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.eval()
    assert dequantise_if_it_fits(model), "there is no room for dequantised weights"
    return model


def products(model: PeftModel, threads: Sequence[int]) -> Iterator[dict[str, object]]:
    """Milliseconds of all matrix products of one step, adapters apart, and what that allows."""
    read = read_model(model)
    weights = [part.stored for layer in read.layers for group in layer.groups.values() for part in group.frozen]
    weights.append(read.head)
    for count in threads:
        torch.set_num_threads(count)
        for rows in (1, 2, 4, 8, 16):
            inputs = {size: torch.randn(rows, size, dtype=read.head.dtype) for size in {w.shape[1] for w in weights}}
            seconds = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                for weight in weights:
                    linear(inputs[weight.shape[1]], weight)
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds)
            yield {
                "threads": count, "rows": rows, "milliseconds": round(1000 * median, 1),
                "tokens_per_second": round(rows / median, 1),
            }  # fmt: skip


def answers(model: PeftModel, threads: Sequence[int], turns: int) -> Iterator[dict[str, object]]:
    """Tokens/s of pipeline and decoder, alternating; the first turn of each is not counted."""
    generators: dict[str, Generator] = {"pipeline": Padded(model, 0), "decoder": plain_decoder(model)}
    for count in threads:
        torch.set_num_threads(count)
        for rows in ROWS:
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in generators}
            for turn in range(turns + 1):
                asked = requests(rows, turn)
                for name, generator in generators.items():
                    figures = measure(generator, asked)
                    if turn:
                        taken[name].append(figures)
            medians = {
                name: {key: statistics.median(each[key] for each in figures) for key in figures[0]}
                for name, figures in taken.items()
            }
            row: dict[str, object] = {"threads": count, "rows": rows, "turns": turns}
            for name, figures in medians.items():
                row |= {f"{name} {key}": round(value, 1) for key, value in figures.items()}
            for key in medians["decoder"]:
                ratios = [d[key] / p[key] for p, d in zip(taken["pipeline"], taken["decoder"], strict=True)]
                row[f"ratio {key}"] = round(statistics.median(ratios), 2)
            yield row


def plain_decoder(model: PeftModel) -> RowDecoder:
    """A decoder that computes every token with a step of its own."""
    decoder = make_decoder(model, tokens=16384)
    decoder.speculates = False
    return decoder


def requests(rows: int, seed: int) -> list[Request]:
    """Prompts that no turn before has had, so that none is found in a cache."""
    generator = torch.Generator().manual_seed(1000 * rows + seed)
    ids = torch.randint(100, 49152, (rows, PROMPT), generator=generator).tolist()
    return [Request(each, ANSWER, ADAPTER, frozenset()) for each in ids]


def measure(generator: Generator, asked: Sequence[Request]) -> dict[str, float]:
    """Tokens/s over everything, and while all rows are decoded."""
    first: dict[int, float] = {}

    def note(number: int, token: Token) -> None:
        first.setdefault(number, time.perf_counter())

    began = time.perf_counter()
    complete(generator, asked, note)
    ended = time.perf_counter()
    return {
        "tokens/s": len(asked) * ANSWER / (ended - began),
        "steps' tokens/s": len(asked) * (ANSWER - 1) / (ended - max(first.values())),
    }


def profile(model: PeftModel, threads: int, rows: int) -> None:
    """Print where the decoder's time goes."""
    torch.set_num_threads(threads)
    decoder = plain_decoder(model)
    complete(decoder, requests(rows, 0))
    with torch.profiler.profile() as profiler:
        complete(decoder, requests(rows, 1))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


def main(arguments: list[str]) -> None:
    """Parse and print."""
    what, numbers = (arguments or [""])[0], [int(each) for each in arguments[1:]]
    if what not in ("products", "answers", "profile"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model = served_model(pathlib.Path(folder))
    head: dict[str, Any] = {"processor": processor(), "torch": torch.__version__, "dtype": str(model.dtype)}
    print(json.dumps(head), flush=True)
    if what == "profile":
        profile(model, *(numbers or [1, 1]))
        return
    threads = [each for each in numbers[:2] if each] or [1, 2]
    rows = products(model, threads) if what == "products" else answers(model, threads, (*numbers, 5, 5, 5)[2])
    for row in rows:
        print(json.dumps(row), flush=True)


def processor() -> str:
    """Its name, as far as the system tells it."""
    file = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(sys.argv[1:])
