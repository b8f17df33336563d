"""The decoder beside its peers, in one process after another on one card: one table.

    python -m bench.decode_peers [--llama-cpp FOLDER FILE.gguf] [--unsloth FOLDER] [--transformers]

    --llama-cpp       a built llama.cpp (build/bin/llama-batched-bench) and a Q4_0 model of Llama-2-7B's shape
    --unsloth         a Llama-2-7B checkpoint in NF4 on the disk, for Unsloth's generate with one row
    --transformers    generate of Transformers, with bitsandbytes and PEFT: one row and sixteen

Each figure is tokens/s from the moment at which every row has its first token, greedy: prompt 512 and answer 64, 128 and 128,
2,048 and 64. nybble's are with an adapter of rank 16 on all linear layers, and without one; llama.cpp's model has none.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from bench.decode import LLAMA_2_7B, ROWS, measure_answers
from bench.quantised_llama import ALL, quantised_llama, with_adapters
from nybble.generate.decoder.choice import make_decoder

LENGTHS = ((512, 64), (128, 128), (2048, 64))
SHORT = 32  # tokens of Transformers' answers, which are slow


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    who: str
    prompt: int
    answer: int
    rows: int
    tokens_per_second: float


def nybble() -> Iterator[Figure]:
    """With an adapter and without."""
    base = quantised_llama(LLAMA_2_7B)
    tuned = with_adapters(base, {"one": (16, ALL)})
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for who, adapter in (("nybble, adapter", "one"), ("nybble, base", None)):
            model = tuned if adapter else tuned.unload()
            decoder = make_decoder(model, tokens=64 * 2176, cache=pathlib.Path(folder))
            decoder.steps.warm_up()
            for prompt, answer in LENGTHS:
                for rows in ROWS:
                    measure_answers(decoder, model, rows, prompt, min(answer, 8), adapter)
                    figures = measure_answers(decoder, model, rows, prompt, answer, adapter)
                    yield Figure(who, prompt, answer, rows, figures["with_all_rows"])
            del decoder
            torch.cuda.empty_cache()


def transformers() -> Iterator[Figure]:
    """generate, as a user of PEFT calls it."""
    model = with_adapters(quantised_llama(LLAMA_2_7B), {"one": (16, ALL)})
    for rows in (1, 16):
        ids = torch.randint(3, 32000, (rows, 512), device="cuda")
        seconds = {}
        for count in (1, 1, SHORT):
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            torch.cuda.synchronize()
            seconds[count] = time.perf_counter() - began
        rate = rows * (SHORT - 1) / (seconds[SHORT] - seconds[1])
        yield Figure("Transformers + PEFT", 512, 64, rows, round(rate, 1))


def unsloth(folder: str) -> Iterator[Figure]:
    """Its own generate with one row, in a process that imports it first."""
    program = f"""
import unsloth, time, torch, json
from unsloth import FastLanguageModel
model, _ = FastLanguageModel.from_pretrained({folder!r}, max_seq_length=2048, load_in_4bit=True, dtype=torch.bfloat16)
FastLanguageModel.for_inference(model)
ids = torch.randint(3, 32000, (1, 512), device="cuda")
def run(count):
    torch.cuda.synchronize()
    began = time.perf_counter()
    options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    torch.cuda.synchronize()
    return time.perf_counter() - began
run(8); run(64)
one, many = run(1), run(64)
print("RATE", 63 / (many - one))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    rates = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RATE")]
    if not rates:
        print(done.stderr[-2000:], file=sys.stderr)
    yield from (Figure("Unsloth", 512, 64, 1, round(float(rate), 1)) for rate in rates)


def llama_cpp(folder: str, file: str) -> Iterator[Figure]:
    """llama-batched-bench, whose S_TG is tokens/s after the prompts."""
    program = pathlib.Path(folder, "build/bin/llama-batched-bench")
    for prompt, answer in LENGTHS:
        rows = [count for count in ROWS if count in (1, 4, 8, 16, 32, 64)]
        context = 64 * (prompt + answer)
        options = {
            "-m": file, "-c": context, "-b": 2048, "-ub": 512, "-npp": prompt, "-ntg": answer,
            "-npl": ",".join(map(str, rows)), "-ngl": 99, "-fa": "on",
        }  # fmt: skip
        arguments = [str(each) for pair in options.items() for each in pair]
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) >= 8 and cells[0].isdigit():
                yield Figure("llama.cpp Q4_0", prompt, answer, int(cells[2]), float(cells[7]))


def table(figures: Iterable[Figure]) -> Iterator[str]:
    """In Markdown, by lengths; nybble's figures beside llama.cpp's as ratios."""
    found = {(each.who, each.prompt, each.answer, each.rows): each.tokens_per_second for each in figures}
    for prompt, answer in LENGTHS:
        yield f"\nprompt {prompt:,}, answer {answer}\n"
        yield "| tokens/s | " + " | ".join(map(str, ROWS)) + " |"
        yield "| --- |" + " --- |" * len(ROWS)
        for who in dict.fromkeys(key[0] for key in found if key[1:3] == (prompt, answer)):
            cells = [found.get((who, prompt, answer, rows)) for rows in ROWS]
            yield f"| {who} | " + " | ".join("" if cell is None else f"{cell:,.0f}" for cell in cells) + " |"
        ratios = [
            (found.get(("nybble, adapter", prompt, answer, rows)), found.get(("llama.cpp Q4_0", prompt, answer, rows)))
            for rows in ROWS
        ]
        if any(peer for _, peer in ratios):
            shown = [f"{own / peer:.2f}" if own and peer else "" for own, peer in ratios]
            yield "| adapter to llama.cpp | " + " | ".join(shown) + " |"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", nargs=2, metavar=("FOLDER", "GGUF"))
    parser.add_argument("--unsloth", metavar="FOLDER")
    parser.add_argument("--transformers", action="store_true")
    chosen = parser.parse_args()
    sources = [nybble()]
    sources += [transformers()] if chosen.transformers else []
    sources += [llama_cpp(*chosen.llama_cpp)] if chosen.llama_cpp else []
    sources += [unsloth(chosen.unsloth)] if chosen.unsloth else []
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    figures: list[Figure] = []
    for source in sources:
        for figure in source:
            figures.append(figure)
            print(json.dumps(figure.__dict__), flush=True)
        torch.cuda.empty_cache()
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
