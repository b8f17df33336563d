"""What the server itself costs for each token: streaming clients, and a generator that makes tokens as fast as they are taken.

    python -m bench.serve_rate TOKENIZER [--clients 64] [--tokens 256] [--pause 0] [--profile FILE]

Three processes: the server, the generator's process with a stub in place of a model, and the clients, which only count events.
TOKENIZER is a folder with a tokenizer, such as a run's. The stub gives every request one token a step, the next of a fixed text;
with --pause, a step takes so many milliseconds at least, as a model would. Prints tokens a second, and the microseconds of CPU
time that each of the processes used for a token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
from rich.console import Console

from bench.stub import QUEUE, stub_engine
from nybble.serve.app import Limits
from nybble.serve.guard import AccessRules
from nybble.serve.metrics import Metrics
from nybble.serve.process.messages import LoadingJob
from nybble.serve.process.start import start_process
from nybble.serve.server import listen, make_server


async def client(host: str, port: int, tokens: int) -> int:
    """Send one streaming request, and count its events; a light client, which parses nothing."""
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({
        "model": "stub", "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "stream": True,
    }).encode()  # fmt: skip
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close"
    )
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    events = 0
    while data := await reader.read(65536):
        events += data.count(b"data: ")
    writer.close()
    return events


async def clients(host: str, port: int, count: int, tokens: int) -> dict[str, float]:
    """Tokens a second of so many clients at once."""
    began = time.perf_counter()
    events = await asyncio.gather(*(client(host, port, tokens) for _ in range(count)))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tok_s": count * tokens / seconds, "events_per_token": sum(events) / (count * tokens)}


@contextlib.contextmanager
def served(folder: pathlib.Path, pause: float, profile: str | None) -> Iterator[tuple[int, int]]:
    """A server around a stub; its port and the id of the generator's process."""
    metrics = Metrics()
    job = LoadingJob("bench.stub:load_stub", {"folder": folder, "pause": pause})
    worker, _ = start_process(job, metrics)
    listener = listen("127.0.0.1", 0)
    engine = stub_engine(worker, folder)
    server = make_server(engine, metrics, Limits(queue=QUEUE), AccessRules(), Console(quiet=True))
    profiler = cProfile.Profile()

    def work() -> None:
        if profile:
            profiler.runcall(server.run, [listener])
        else:
            server.run([listener])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1], worker.process.pid
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        listener.close()
        if profile:
            profiler.dump_stats(profile)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=pathlib.Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pause", type=float, default=0.0, help="milliseconds that a step takes at least")
    parser.add_argument("--profile", help="write the server's profile to this file; it slows the server down")
    parser.add_argument("--as-client", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_client:
        print(json.dumps(asyncio.run(clients("127.0.0.1", given.as_client, given.clients, given.tokens))))
        return
    with served(given.tokenizer, given.pause / 1000, given.profile) as (port, generator):
        options = [str(given.tokenizer), "--as-client", str(port), "--clients", str(given.clients)]
        command = [sys.executable, "-m", "bench.serve_rate", *options]
        # the first requests load what the others need
        subprocess.run([*command, "--tokens", "8"], check=True, capture_output=True)
        before = cpu_seconds(os.getpid()), cpu_seconds(generator)
        done = subprocess.run([*command, "--tokens", str(given.tokens)], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        for name, spent in (
            ("server", cpu_seconds(os.getpid()) - before[0]),
            ("generator", cpu_seconds(generator) - before[1]),
        ):
            row[f"{name}_us_per_token"] = 1e6 * spent / (given.clients * given.tokens)
    figures = {name: round(value, 2) for name, value in row.items()}
    print(json.dumps({"clients": given.clients, "tokens": given.tokens, **figures}))


if __name__ == "__main__":
    main()
