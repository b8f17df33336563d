"""A real server on loopback, in a thread of the test, and ways to ask it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from rich.console import Console
from safetensors.torch import load_file, save_file

from nybble.run.folder import Run, open_run
from nybble.run.marks import COMPLETE
from nybble.serve.app import Limits
from nybble.serve.guard import AccessRules
from nybble.serve.metrics import Metrics
from nybble.serve.server import Server, listen, make_server


@dataclass
class Served:
    """A server under test."""

    url: str
    engine: object
    metrics: Metrics
    server: Server
    thread: threading.Thread
    http: httpx.Client
    """One client: each of httpx.post's own reads the certificates of the web first."""

    def post(self, route="/v1/chat/completions", timeout=60, **body) -> httpx.Response:
        return self.http.post(self.url + route, json=body, timeout=timeout)

    def chat(self, model, text, **more) -> dict:
        answer = self.post(model=model, messages=[{"role": "user", "content": text}], **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, as /metrics shows them."""
        text = self.http.get(self.url + "/metrics").text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M))

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(make_engine, limits=None, key=None, origins=(), hosts=()) -> Iterator[Served]:
    metrics = Metrics()
    engine = make_engine(metrics)
    listener = listen("127.0.0.1", 0)
    server = make_server(
        engine, metrics, limits or Limits(timeout=60), AccessRules(key, origins, hosts), Console(quiet=True)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not server.started:
            time.sleep(0.01)
        with httpx.Client() as client:
            yield Served(url, engine, metrics, server, thread, client)
    finally:
        server.should_exit = True
        thread.join(60)
        engine.close()
        listener.close()
        assert not thread.is_alive(), "the server did not end"


def another_run(run: Run, name: str, factor: float) -> Run:
    """A copy of a run under another name, with an adapter of another strength."""
    folder = run.folder.parent / name
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value * (factor if "lora_B" in key else 1) for key, value in tensors.items()}, file)
    (file.parent / COMPLETE).unlink()  # as whoever changes an adapter must
    return open_run(folder)


def events(lines) -> list[dict]:
    """The JSON of server-sent events; [DONE] must be the last."""
    said = [line.removeprefix("data: ") for line in lines if line]
    assert said[-1] == "[DONE]"
    return [json.loads(line) for line in said[:-1]]


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    """Wait until a server in a process of its own answers."""
    end = time.monotonic() + 180
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < end
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.3)


@contextlib.contextmanager
def serving_run(load, run: Run, cache) -> Iterator[Served]:
    """A server of one run; a decoder goes a step ahead, as on a GPU."""
    with serving(lambda metrics: load([run], metrics, device="cpu", queue=64, cache=cache)) as server:
        steps = getattr(server.engine.worker.generator, "steps", None)
        if steps is not None:
            steps.asynchronous = True
        yield server
