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
from collections.abc import Iterator, Sequence

import psutil
from rich.console import Console
from transformers import AutoTokenizer

from nybble.data.text.template import choose_template
from nybble.generate.request import Handle, Observer, Request, Sink, Token
from nybble.serve.app import Limits
from nybble.serve.engine import Engine, ServedModel
from nybble.serve.guard import AccessRules
from nybble.serve.metrics import Metrics
from nybble.serve.process.messages import LoadingJob
from nybble.serve.process.start import start_process
from nybble.serve.server import listen, make_server
from nybble.serve.threaded import InThread

TEXT = "The sea is a large body of salt water, and its waves never rest. " * 4
QUEUE = 256


class StubRow:
    """A request, and how many of its tokens were made."""

    def __init__(self, request: Request, sink: Sink) -> None:
        self.request, self.sink, self.made, self.cancelled = request, sink, 0, False

    def cancel(self) -> None:
        """Stop."""
        self.cancelled = True


class Stub:
    """A generator that gives every row one token a step.

    Args:
        ids: the tokens of every answer, again and again.
        pause: seconds that a step takes at least.
        observer: is notified of the load.
    """

    def __init__(self, ids: Sequence[int], pause: float, observer: Observer) -> None:
        self.vocabulary, self.positions = max(ids) + 1, 1_000_000
        self.ids, self.pause, self.observer = ids, pause, observer
        self.rows: list[StubRow] = []
        self.lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Requests that a step would bring on."""
        return len(self.rows)

    def healthy(self) -> bool:
        """Always."""
        return True

    def worth_waiting_for(self, *, idle: bool) -> tuple[int, float]:
        """None."""
        return 0, 0.0

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        """Queue all of these."""
        new = [StubRow(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        with self.lock:
            self.rows += new
        self.observer.load_changed(len(self.rows), 0)
        return list[Handle](new)

    def step(self) -> bool:
        """A token for each row."""
        began = time.perf_counter()
        with self.lock:
            rows = list(self.rows)
        self.observer.batch_started(len(rows))
        for row in rows:
            row.sink.put(Token(self.ids[row.made % len(self.ids)]))
            row.made += 1
        over = [row for row in rows if row.cancelled or row.made == row.request.max_tokens]
        for row in over:
            row.sink.end("cancelled" if row.cancelled else "length")
        if over:
            with self.lock:
                self.rows = [row for row in self.rows if row not in over]
            self.observer.load_changed(len(self.rows), 0)
        time.sleep(max(0.0, self.pause - (time.perf_counter() - began)))
        return bool(self.rows)

    def close(self) -> None:
        """End all."""
        for row in self.rows:
            row.sink.end("cancelled")
        self.rows = []


def load_stub(observer: Observer, *, folder: pathlib.Path, pause: float) -> Engine:
    """An engine around a stub."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return stub_engine(InThread(Stub(ids, pause, observer)), folder)


def stub_engine(worker, folder: pathlib.Path) -> Engine:  # type: ignore[no-untyped-def]
    """An engine of one model."""
    template = choose_template(AutoTokenizer.from_pretrained(folder), "alpaca", "alpaca")
    model = ServedModel("stub", template, 1_000_000, None, len(template.tokenizer))
    return Engine("stub", "", {"stub": model}, {}, QUEUE, worker, folder)


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
    job = LoadingJob("bench.serve_rate:load_stub", {"folder": folder, "pause": pause})
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
        subprocess.run(
            [*command, "--tokens", "8"], check=True, capture_output=True
        )  # the first requests load what others need
        before = cpu_seconds(os.getpid()), cpu_seconds(generator)
        done = subprocess.run([*command, "--tokens", str(given.tokens)], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout)
        for name, spent in (
            ("server", cpu_seconds(os.getpid()) - before[0]),
            ("generator", cpu_seconds(generator) - before[1]),
        ):
            row[f"{name}_us_per_token"] = 1e6 * spent / (given.clients * given.tokens)
    print(
        json.dumps(
            {"clients": given.clients, "tokens": given.tokens} | {name: round(value, 2) for name, value in row.items()}
        )
    )


if __name__ == "__main__":
    main()
