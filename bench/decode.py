"""How fast the decoder answers: a random Llama-2-7B in NF4 with an adapter, beside the padded batches of the pipeline.

    python -m bench.decode steps [512]              one step by rows, so many tokens cached: base alone, and with its adapter
    python -m bench.decode answers [512 64] [SHAPE] prompts and answers of so many tokens, by rows: the whole way from ids to ids;
                                                    llama-2-7b, llama-2-13b or llama-3-8b; with "fp8" that kind of cache
    python -m bench.decode answers 512 32 padded    the same by the pipeline in padded batches, one row and sixteen

Speed does not depend on the weights' values. One JSON line for each row; times are medians, memory is torch's
max_memory_reserved in 1e9 bytes, beside what the ledger plans for weights, cache and the decoder's buffers.
"""

from __future__ import annotations

import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from bench.quantised_llama import ALL, Shape, quantised_llama, with_adapters
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.decoder.cuda_step import CudaStep, PackedModel, StepInput, pack_model
from nybble.generate.decoder.cuda_steps import CHUNK
from nybble.generate.decoder.model import read_model
from nybble.generate.decoder.pages import PAGE
from nybble.generate.decoder.step_graphs import SIZES
from nybble.generate.padded import Padded
from nybble.generate.request import Generator, Request, Token, complete
from nybble.kernels.cuda.buffers import SharedBuffers
from nybble.kernels.cuda.kernels import Kernels
from nybble.plan.generation_bytes import decoder_workspace_bytes, kv_cache_bytes_per_token
from nybble.plan.shapes import ModelShape

LLAMA_2_7B = Shape(4096, 32, 32, 128, 11008, layers=32, vocabulary=32000)
SHAPES = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": Shape(5120, 40, 40, 128, 13824, layers=40, vocabulary=32000),
    "llama-3-8b": Shape(4096, 32, 8, 128, 14336, layers=32, vocabulary=128256),
}
ROWS = (1, 4, 8, 16, 24, 32, 48, 64)
REPLAYS = 50


def steps(cached: int) -> Iterator[dict[str, object]]:
    """A step's time, in a CUDA graph as the decoder replays it."""
    base = quantised_llama(LLAMA_2_7B)
    kernels = Kernels(torch.device("cuda"), None)
    for label, model in (("base", base), ("adapter r 16", with_adapters(base, {"one": (16, ALL)}))):
        packed = pack_model(read_model(model))
        for rows in ROWS:
            seconds = step_time(packed, kernels, rows, cached)
            yield {
                "model": label, "rows": rows, "cached": cached, "milliseconds": round(1000 * seconds, 3),
                "tokens_per_second": round(rows / seconds),
            }  # fmt: skip


def step_time(packed: PackedModel, kernels: Kernels, rows: int, cached: int) -> float:
    """Seconds of a step, the median of many replays."""
    model, pages = packed.model, cached // PAGE + 1
    shape = (len(model.layers), 2, rows * pages, model.kv_heads, PAGE, model.head_size)
    cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    inputs = StepInput(
        torch.randint(0, model.vocabulary, (rows,), device="cuda", dtype=torch.int32),
        torch.full((rows,), cached - 1, device="cuda", dtype=torch.int32),
        torch.arange(rows * pages, device="cuda", dtype=torch.int32).view(rows, pages),
        torch.zeros(rows, device="cuda", dtype=torch.int32),
    )
    step = CudaStep(packed, kernels, inputs, cache, model.rotary_tables(4096), SharedBuffers(model.device))
    step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    times = []
    for replay in range(REPLAYS + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 5:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def answers(shape: str, prompt: int, answer: int, padded: bool, fp8: bool) -> Iterator[dict[str, object]]:
    """Answers by rows: the second time each, when all is compiled and captured."""
    model = with_adapters(quantised_llama(SHAPES[shape]), {"one": (16, ALL)})
    gc.collect()
    torch.cuda.empty_cache()  # what the weights were made from
    torch.cuda.reset_peak_memory_stats()
    sizes, tokens = ModelShape.from_config(model.config.to_dict()), ROWS[-1] * (prompt + answer + 64)
    cache = tokens * kv_cache_bytes_per_token(sizes, 1 if fp8 else 2)
    planned = torch.cuda.memory_allocated() + cache + decoder_workspace_bytes(sizes, SIZES[-1], CHUNK)
    with tempfile.TemporaryDirectory() as folder:
        generator = Padded(model, 0) if padded else make_decoder(
            model, tokens=tokens, cache=pathlib.Path(folder), fp8_cache=fp8
        )  # fmt: skip
        for rows in (1, 16) if padded else ROWS:
            measure_answers(generator, model, rows, prompt, answer)
            figures = measure_answers(generator, model, rows, prompt, answer)
            yield {
                "model": shape,
                "generator": "pipeline" if padded else "decoder",
                "rows": rows,
                "prompt": prompt,
                "answer": answer,
                "planned_gb": round(planned / 1e9, 2),
            } | figures


def measure_answers(
    generator: Generator, model: PeftModel | LlamaForCausalLM, rows: int, prompt: int, answer: int,
    adapter: str | None = "one",
) -> dict[str, float]:  # fmt: skip
    """Tokens/s over everything, and from the moment at which every row has its first token."""
    ids = torch.randint(3, model.config.vocab_size, (rows, prompt)).tolist()
    requests = [Request(each, answer, adapter, frozenset()) for each in ids]
    firsts: dict[int, float] = {}
    stamps: list[float] = []

    def note(number: int, token: Token) -> None:
        stamps.append(time.perf_counter())
        firsts.setdefault(number, stamps[-1])

    began = time.perf_counter()
    complete(generator, requests, note)
    ended, last = time.perf_counter(), max(firsts.values())
    after = sum(stamp > last for stamp in stamps)
    return {
        "tokens_per_second": round(rows * answer / (ended - began), 1),
        "with_all_rows": round(after / (ended - last), 1) if after else 0.0,
        "first_token_ms": round(1000 * (min(firsts.values()) - began), 1),
        "median_first_token_ms": round(1000 * (statistics.median(firsts.values()) - began), 1),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def main(arguments: list[str]) -> None:
    """Parse and print."""
    what, numbers = (arguments or [""])[0], [int(each) for each in arguments[1:] if each.isdigit()]
    with torch.inference_mode():
        if what == "steps":
            rows = steps(*(numbers or [512]))
        elif what == "answers":
            shape = next((each for each in arguments if each in SHAPES), "llama-2-7b")
            rows = answers(shape, *(numbers or [512, 64]), padded="padded" in arguments, fp8="fp8" in arguments)
        else:
            sys.exit(__doc__)
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
