"""`nybble serve` as a person starts it, on the Llama-2-7B shape with four adapters: rates and first tokens, by light clients.

    python -m bench.served prepare DIR TOKENIZER       random weights (bench.train prepare) and four random adapters of rank 16
    python -m bench.served measure DIR [--answer 256]  starts the server and asks it from this process: one JSON line each

Prompts are 100 random token ids each. `whole` counts from the first request to the last token; compare it with tokens_per_second
of `python -m bench.decode answers 100 256` on the same card.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

from bench.serve import bare_adapter
from bench.train import prepare

PORT = 8123
ADAPTERS = 4
PROMPT = 100
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close"


async def client(model: str, answer: int) -> tuple[float, float, int]:
    """When the first token of a streamed answer came, when the last one did, and how many there were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=2**20)
    prompt = [random.randrange(300, 30000) for _ in range(PROMPT)]
    body = json.dumps({
        "model": model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    })  # fmt: skip
    writer.write(f"{HEAD}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    await reader.readuntil(b"\r\n\r\n")
    first, latest = 0.0, b""
    while data := await reader.read(65536):
        first = first or time.perf_counter()
        latest = (latest + data)[-2000:]
    writer.close()
    tokens = re.findall(rb'"completion_tokens":\s*(\d+)', latest)
    return first, time.perf_counter(), int(tokens[-1])


async def ask(models: list[str], count: int, answer: int) -> dict[str, float]:
    """So many clients at once, with the models in turn."""
    began = time.perf_counter()
    got = await asyncio.gather(*(client(models[n % len(models)], answer) for n in range(count)))
    tokens, ended = sum(made for *_, made in got), max(last for _, last, _ in got)
    return {
        "clients": count, "models": len(models), "tokens": tokens, "whole": round(tokens / (ended - began), 1),
        "first_token_ms": round(1000 * (min(first for first, *_ in got) - began), 1),
        "median_first_token_ms": round(1000 * (statistics.median(first for first, *_ in got) - began), 1),
    }  # fmt: skip


def wait_until_ready(process: subprocess.Popen[bytes]) -> float:
    """Seconds until the server answers."""
    began = time.perf_counter()
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
        except OSError:
            time.sleep(0.2)
        else:
            return time.perf_counter() - began
    sys.exit("the server ended")


def measure(folder: pathlib.Path, answer: int) -> None:
    """Start, ask, stop."""
    adapters = [str(folder / f"adapter{n}") for n in range(ADAPTERS)]
    names = [pathlib.Path(adapter).name for adapter in adapters]
    process = subprocess.Popen([sys.executable, "-m", "nybble", "serve", *adapters, "--port", str(PORT)])
    try:
        print(json.dumps({"seconds_to_start": round(wait_until_ready(process), 1)}), flush=True)
        asyncio.run(ask(names[:1], 1, 16))
        alone = [asyncio.run(ask(names[:1], 1, 16))["first_token_ms"] for _ in range(9)]
        print(json.dumps({"one_client_first_token_ms": statistics.median(alone)}), flush=True)
        for models in (names[:1], names):
            for count in (1, 4, 16, 64):
                asyncio.run(ask(models, count, 16))
                print(json.dumps(asyncio.run(ask(models, count, answer))), flush=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "measure"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("tokenizer", type=pathlib.Path, nargs="?")
    parser.add_argument("--answer", type=int, default=256)
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.folder, given.tokenizer)
        for number in range(ADAPTERS):
            bare_adapter(given.folder / "nf4", given.folder / f"adapter{number}")
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "4")
        measure(given.folder, given.answer)


if __name__ == "__main__":
    main()
