"""A running `nybble serve` under load.

    python -m bench.load URL MODEL [--requests 500] [--at-once 16] [--max-tokens 16] [--alone | --stream]

Sends greedy requests from --at-once clients. With --alone, each prompt is first sent alone, and every answer is compared
with that one: where the two differ, the gap between the two likeliest tokens is measured; `widest_gap` is the largest of
these. With --stream, answers are streamed, and the time to the first token is measured: for one client alone, and the
median of all.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import functools
import json
import re
import statistics
import time
from typing import Any

try:
    import httpx
except ModuleNotFoundError:  # huggingface_hub 2 installs its successor
    import httpx2 as httpx

PROMPTS = [
    f"{verb} {thing}."
    for verb in ("Describe in one sentence", "Give three facts about", "Write a short poem about", "Explain to a child")
    for thing in (
        "the sea",
        "bread",
        "a bicycle",
        "winter",
        "the moon",
        "gravity",
        "a library",
        "bees",
        "rivers",
        "trust",
    )
]
CLIENTS = 16


@functools.cache
def http() -> httpx.Client:
    """One HTTP client for all requests: httpx.post would make one each time, which takes 50 ms."""
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))
    atexit.register(client.close)
    return client


def ask(url: str, model: str, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    """Send one request. Returns status, seconds and body."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        **more,
    }
    began = time.perf_counter()
    response = http().post(f"{url}/v1/chat/completions", json=body)
    return {"status": response.status_code, "seconds": time.perf_counter() - began, "body": response.json()}


def stream(url: str, model: str, prompt: str, tokens: int) -> tuple[float, float, int]:
    """Send one streaming request. Returns seconds to the first token, seconds in all, and tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    began, first, made = time.perf_counter(), 0.0, 0
    with http().stream("POST", f"{url}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - began
            usage = json.loads(line[6:]).get("usage")
            made = usage["completion_tokens"] if usage else made
    return first, time.perf_counter() - began, made


def metric(url: str, name: str) -> float:
    """The sum of a metric's samples."""
    text = http().get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def gap_at_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float | None:
    """Nats between the two likeliest tokens where two answers first differ; None if they are the same."""
    for mine, its in zip(one, other, strict=False):
        if mine["bytes"] != its["bytes"]:
            first, second = mine["top_logprobs"][:2]
            return float(first["logprob"] - second["logprob"])
    return None


def load(url: str, model: str, requests: int, at_once: int, max_tokens: int, alone: bool) -> dict[str, Any]:
    """Send requests from several clients at once."""
    detail = {"logprobs": True, "top_logprobs": 2}

    def content(answer: dict[str, Any]) -> list[dict[str, Any]]:
        return list(answer["body"]["choices"][0]["logprobs"]["content"])

    singles = {prompt: content(ask(url, model, prompt, max_tokens, **detail)) for prompt in PROMPTS} if alone else {}
    batches, rows = metric(url, "nybble_batch_rows_count"), metric(url, "nybble_batch_rows_sum")
    asked = [PROMPTS[number * 7 % len(PROMPTS)] for number in range(requests)]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as clients:
        answers = list(clients.map(lambda prompt: ask(url, model, prompt, max_tokens, **detail), asked))
    seconds = time.perf_counter() - began
    good = [answer for answer in answers if answer["status"] == 200]
    made = sum(answer["body"]["usage"]["completion_tokens"] for answer in good)
    gaps = [
        gap
        for prompt, answer in zip(asked, answers, strict=True)
        if alone
        and answer["status"] == 200
        and (gap := gap_at_difference(content(answer), singles[prompt])) is not None
    ]
    took = sorted(answer["seconds"] for answer in answers)
    return {
        "requests": requests, "at_once": at_once, "errors": requests - len(good), "seconds": round(seconds, 1),
        "tokens": made, "tok_s": round(made / seconds, 2), "median_s": round(statistics.median(took), 2),
        "slowest_s": round(took[-1], 2), "parted": len(gaps), "widest_gap": max(gaps, default=0.0),
        "mean_batch": round(
            (metric(url, "nybble_batch_rows_sum") - rows) / (metric(url, "nybble_batch_rows_count") - batches), 2
        ),
        "left_running": metric(url, "nybble_running"), "left_waiting": metric(url, "nybble_waiting"),
    }  # fmt: skip


def load_streams(url: str, model: str, requests: int, at_once: int, max_tokens: int) -> dict[str, Any]:
    """Send streaming requests from several clients at once."""
    stream(url, model, PROMPTS[0], 8)  # the first request loads what the others need
    alone = stream(url, model, PROMPTS[0], 8)[0]
    asked = [PROMPTS[number * 7 % len(PROMPTS)] for number in range(requests)]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as clients:
        got = list(clients.map(lambda prompt: stream(url, model, prompt, max_tokens), asked))
    seconds = time.perf_counter() - began
    return {
        "alone_first_token_s": round(alone, 3), "first_token_s": round(statistics.median(first for first, *_ in got), 3),
        "served_tok_s": round(sum(made for *_, made in got) / seconds, 1), "tokens": sum(made for *_, made in got),
        "seconds": round(seconds, 2),
    }  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=CLIENTS)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    load_options = (given.url, given.model, given.requests, given.at_once, given.max_tokens)
    result = load_streams(*load_options) if given.stream else load(*load_options, given.alone)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
