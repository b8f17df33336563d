"""The generator in a process of its own: real processes, with a tiny run and with a stub."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch

from nybble.errors import RunError, ServeError
from nybble.generate.lost import why_card_is_lost
from nybble.generate.request import BusyError, GenerationError, NonFiniteLogitsError, Request, Token, UnsupportedError
from nybble.installed import module_command
from nybble.serve.loading import load_pipeline
from nybble.serve.metrics import Metrics
from nybble.serve.process.child import portable
from nybble.serve.process.messages import (
    Cancellation,
    EngineFacts,
    FirstMessage,
    LoadingJob,
    Report,
    Submission,
    Unpacker,
    pack,
    receive,
)
from nybble.serve.process.outbox import Outbox, RemoteSink
from nybble.serve.process.remote import RemoteWorker, how_it_ended
from nybble.serve.process.start import start_process
from nybble.serve.server import load_engine
from tests.conftest import ROOT
from tests.local_server import events, serving

QUEUE = 3


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def server(tuned_run, cache, gate):
    """A server whose generator's process has the tiny run."""

    def make(metrics):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nybble.serve.server.LoadingJob", gated_job(gate))
            return load_engine("pipeline", [tuned_run], metrics, device="cpu", queue=QUEUE, cache=cache)

    with serving(make) as server:
        yield server


def gated_job(gate):
    def job(load, arguments, prepare):
        assert load == "nybble.serve.loading:load_named"
        assert arguments.pop("engine") == "pipeline"
        assert arguments.pop("fp8_cache") is False
        return LoadingJob("tests.serve.loaders:load_gated", {**arguments, "gate": gate}, prepare)

    return job


def ask(text="say one two 3", **more):
    return {"model": "run", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0, **more}


def test_answers_are_those_of_a_thread_in_this_process(server, tuned_run, tiny_llama, cache):
    bodies = [
        ask(), ask("go on", n=2, temperature=1.2, seed=3), ask(model=tiny_llama.name, max_tokens=40), ask(stop=["e"]),
        ask(logprobs=True, top_logprobs=2),
    ]  # fmt: skip

    def answers(server):
        return [server.post(**body).json()["choices"] for body in bodies]

    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as other:
        assert answers(server) == answers(other)
        assert server.engine.models.keys() == other.engine.models.keys()
        assert server.engine.adapters == other.engine.adapters
    body = ask(model=tiny_llama.name, max_tokens=40, stream=True)
    with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        parts = events(response.iter_lines())
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == server.post(**(body | {"stream": False})).json()["choices"][0]["message"]["content"]
    assert server.metric("nybble_batch_rows_count") >= len(bodies)
    server.wait_for("nybble_running", 0)
    assert server.http.get(f"{server.url}/health").status_code == 200


def test_what_is_told_of_a_prompt_and_grammars_cross_the_processes(server, tuned_run, cache):
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    echo = {"model": "run", "prompt": "say one two 3", "max_tokens": 0, "echo": True, "logprobs": 2}

    def answers(server):
        bodies = [server.post(**ask(response_format=shape)), server.post("/v1/completions", **echo)]
        return [body.json()["choices"] for body in bodies]

    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as other:
        (named,), (echoed,) = answers(server)
        assert answers(other) == [[named], [echoed]]
    assert json.loads(named["message"]["content"]) in ("red", "blue")
    assert len(echoed["logprobs"]["token_logprobs"]) > 3


def test_too_many_answers_are_refused_at_once_and_those_that_leave_make_room(server, gate):
    gate.touch()
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            ahead = threads.submit(server.post, **ask())
            server.wait_for("nybble_running", 1)
            with pytest.raises(httpx.ReadTimeout):
                server.post(**ask(n=QUEUE), timeout=0.3)  # they wait, and then are cancelled
            waiting = threads.submit(server.post, **ask(n=QUEUE))
            server.wait_for("nybble_waiting", QUEUE)
            refused = server.post(**ask())
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            gate.unlink()
            assert ahead.result().status_code == waiting.result().status_code == 200
    finally:
        gate.unlink(missing_ok=True)
    server.wait_for("nybble_running", 0)


def test_a_reader_that_leaves_ends_the_generation(server, tiny_llama):
    body, before = ask(model=tiny_llama.name, max_tokens=400, stream=True), server.metric("nybble_tokens_total")
    with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
    server.wait_for("nybble_running", 0, 5)
    text = server.http.get(f"{server.url}/metrics").text
    assert f'nybble_answers_total{{finish="cancelled",model="{tiny_llama.name}"}} 1.0' in text
    assert server.metric("nybble_tokens_total") - before < 400  # of the prompt and of the answer


def test_the_process_ignores_signals_that_reach_both(server):
    for number in (signal.SIGINT, signal.SIGTERM):
        server.engine.worker.process.send_signal(number)
    assert server.chat("run", "say one", max_tokens=2)["choices"]


def test_a_process_that_is_killed_fails_every_answer_and_says_so_once(server, tiny_llama, gate, caplog):
    """The last test of this server."""
    logging.getLogger("nybble.serve").propagate = True
    long = ask(model=tiny_llama.name, max_tokens=400)
    gate.touch()
    with caplog.at_level("ERROR", "nybble.serve"), concurrent.futures.ThreadPoolExecutor(3) as threads:
        whole = threads.submit(server.post, **long)
        server.wait_for("nybble_running", 1)
        waiting = threads.submit(server.post, **long)
        server.wait_for("nybble_waiting", 1)
        body = long | {"stream": True}
        with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            server.engine.worker.process.kill()
            last = [line for line in response.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        for answer in (whole.result(), waiting.result(), server.post(**long)):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the engine failed"
        assert server.http.get(f"{server.url}/health").json()["status"] == "failed"
        assert server.metric("nybble_running") == server.metric("nybble_waiting") == 0
        until = time.monotonic() + 5
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.02)
    assert [record.getMessage() for record in caplog.records] == [
        "the engine failed: its process was killed (SIGKILL; the system kills processes when memory runs out); "
        "restart the server"
    ]


def test_an_error_while_loading_is_raised_here_as_it_was_there(tuned_run, cache):
    with pytest.raises(ServeError, match="the engine continuous needs a merged model") as raised:
        load_engine("continuous", [tuned_run], Metrics(), device="cpu", queue=16, cache=cache)
    assert raised.value.where.endswith("export/merged")
    assert raised.value.fix == f"nybble export {tuned_run.folder} --to merged"
    assert "in the generator's process:\nTraceback" in raised.value.__notes__[0]


def test_a_template_that_is_gone_once_the_model_is_loaded_ends_the_process(tuned_run, cache, monkeypatch, capsys):
    started = []

    def start(job, observer):
        arguments = {"folder": tuned_run.folder / "tokenizer", "pause": 0}
        started.append(start_process(LoadingJob("bench.stub:load_stub", arguments), observer))
        return started[-1]

    def refuse(run, base):
        raise RunError("the template is gone")

    monkeypatch.setattr("nybble.serve.server.start_process", start)
    monkeypatch.setattr("nybble.serve.server.load_template", refuse)
    with pytest.raises(RunError) as refused:
        load_engine("pipeline", [tuned_run], Metrics(), device="cpu", queue=QUEUE, cache=cache)
    print(refused.value)
    assert "the template is gone" in capsys.readouterr().out
    ((worker, _),) = started
    assert worker.process.wait(10) is not None


def test_a_process_that_is_killed_while_loading_says_so(caplog):
    with pytest.raises(ServeError, match=r"process that loads the model was killed \(SIGKILL; the system kills"):
        start_process(LoadingJob("tests.serve.loaders:die_while_loading", {}), Metrics())
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("nybble.chat", "loading 7")]


@pytest.mark.parametrize(
    ("loader", "begin", "end"),
    [("load_broken", "because of an unexpected error; restart the server\nTraceback", "ZeroDivisionError: division by zero"),
     ("load_lost", "because the GPU is lost (CUDA error: unspecified launch failure); ", "restart the server")],
)  # fmt: skip
def test_what_ends_the_generator_is_told_once_and_ends_the_process(loader, begin, end, caplog, tiny_llama):
    logging.getLogger("nybble.serve").propagate = True

    async def work():
        sink = Recorder()
        await worker.start()
        await worker.submit([REQUEST], [sink])
        while worker.healthy():
            await asyncio.sleep(0.01)
        with pytest.raises(GenerationError, match="the engine failed"):
            await worker.submit([REQUEST], [Recorder()])
        await worker.stop()
        return sink.items

    worker, _ = start_process(LoadingJob(f"tests.serve.loaders:{loader}", {"folder": tiny_llama}), Metrics())
    try:
        assert asyncio.run(work()) == ["cancelled"]
    finally:
        worker.close()
    assert worker.process.returncode == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the engine failed {begin}")
    assert record.getMessage().endswith(end)


def test_a_process_whose_server_ends_while_it_loads_tidies_up(tmp_path):
    ours, its = socket.socketpair()
    with its:
        command = module_command("nybble.serve.process", str(its.fileno()))
        process = subprocess.Popen(command, pass_fds=[its.fileno()], stderr=subprocess.PIPE, text=True)
    job = LoadingJob("tests.serve.loaders:load_forever", {"mark": tmp_path / "mark"})
    with ours:
        ours.sendall(pack(FirstMessage(sys.path, pickle.dumps(job))))
        until = time.monotonic() + 60
        while not (tmp_path / "mark").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # which alone does not end it
        time.sleep(0.1)
        assert (tmp_path / "mark").read_text() == "loading"
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (1, "")
    assert (tmp_path / "mark").read_text() == "tidy"


def test_a_card_is_lost_if_nothing_can_be_computed_on_it_any_more(monkeypatch):
    error = torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert why_card_is_lost(error) is None

    def raise_again():
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", raise_again)
    assert why_card_is_lost(error) == "CUDA error: unspecified launch failure"
    assert why_card_is_lost(RuntimeError("shapes")) is why_card_is_lost(None) is None


@pytest.fixture
def program(tiny_llama):
    """A server with a stub, as a program in a process group of its own; its url and the id of its generator's process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.process_server", str(tiny_llama)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    port, generator = process.stdout.readline().split()
    yield process, f"http://127.0.0.1:{port}/v1/chat/completions", psutil.Process(int(generator))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_lets_answers_finish_and_ends_both_processes(program):
    process, url, generator = program
    with httpx.stream("POST", url, json=ask(model="stub", max_tokens=60, stream=True), timeout=30) as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(4)]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        parts = events([*first, *lines])
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert "running answers finish" in said
    assert "ended" in said
    assert "Traceback" not in said
    assert not generator.is_running()


def test_a_server_that_is_killed_takes_its_process_along(program):
    process, url, generator = program
    with httpx.stream("POST", url, json=ask(model="stub", max_tokens=5000, stream=True), timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        process.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    generator.wait(10)


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.items = []

    def begin(self, cached, prompt):
        self.items.append((cached, len(prompt)))

    def put(self, token):
        self.items.append(token)

    def end(self, finish):
        self.items.append(finish)

    def fail(self, error):
        self.items.append(str(error))


def with_worker(work):
    """Run a coroutine with a worker and the other end of its connection; the process is one that waits."""

    async def main():
        ours, its = socket.socketpair()
        its.setblocking(False)
        process = subprocess.Popen(["sleep", "60"])
        worker = RemoteWorker(process, ours, Metrics())
        await worker.start()
        try:
            await work(worker, its)
        finally:
            process.kill()
            await worker.stop()
            its.close()
            worker.close()

    asyncio.run(main())


async def read(its, unpacker):
    return unpacker.feed(await asyncio.get_running_loop().sock_recv(its, 2**16))


REQUEST = Request([1, 2], 5, None, frozenset({2}))


def test_requests_whose_client_leaves_while_they_are_queued_are_cancelled():
    async def work(worker, its):
        sinks, unpacker, loop = [Recorder(), Recorder()], Unpacker(), asyncio.get_running_loop()
        task = asyncio.ensure_future(worker.submit([REQUEST, REQUEST], sinks))
        (submission,) = await read(its, unpacker)
        assert submission == Submission(0, [(0, REQUEST), (1, REQUEST)])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await read(its, unpacker) == [Cancellation([0, 1])]
        await loop.sock_sendall(
            its, pack(Report(items=[(0, 7), (0, "cancelled"), (1, "cancelled")], replies=[(0, None)]))
        )
        while not sinks[1].items:
            await asyncio.sleep(0.01)
        assert (sinks[0].items, sinks[1].items) == ([Token(7), "cancelled"], ["cancelled"])
        worker.cancel([0, 1])  # they have ended: nothing is sent
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            its.recv(10)

    with_worker(work)


def test_a_refusal_is_raised_and_the_reason_of_an_end_is_told_once(caplog):
    logging.getLogger("nybble.serve").propagate = True

    async def work(worker, its):
        loop, sink = asyncio.get_running_loop(), Recorder()
        for number, error in enumerate([BusyError(7), UnsupportedError("seed", "no seeds"), GenerationError("closed")]):
            task = asyncio.ensure_future(worker.submit([REQUEST], [Recorder()]))
            await loop.sock_sendall(its, pack(Report(replies=[(number, error)])))
            with pytest.raises(type(error), match=str(error)):
                await task
        task = asyncio.ensure_future(worker.submit([REQUEST], [sink]))
        await loop.sock_sendall(its, pack(Report(replies=[(3, None)], items=[(3, NonFiniteLogitsError())])))
        (handle,) = await task
        assert "infinite or NaN" in sink.items[0]
        handle.cancel()
        await loop.sock_sendall(its, pack(Report(healthy=False)))
        while worker.healthy():
            await asyncio.sleep(0.01)
        running, queued = Recorder(), asyncio.ensure_future(worker.submit([REQUEST], [Recorder()]))
        task = asyncio.ensure_future(worker.submit([REQUEST], [running]))
        await loop.sock_sendall(its, pack(Report(replies=[(5, None)], why_ended="because of X")))
        await task
        its.shutdown(socket.SHUT_RDWR)
        with pytest.raises(GenerationError, match="the engine failed"):
            await queued
        assert running.items == ["the engine failed"]
        with pytest.raises(GenerationError, match="the engine failed"):
            await worker.submit([REQUEST], [Recorder()])

    with_worker(work)
    assert [record.getMessage() for record in caplog.records] == ["the engine failed because of X"]


def test_the_tokens_of_a_step_leave_together_and_a_generator_that_fails_while_idle_is_noticed():
    ours, its = socket.socketpair()
    healthy, unpacker, outbox = [True], Unpacker(), Outbox(its)
    with ours, its:
        facts = EngineFacts("stub", "", [], {}, ROOT)
        outbox.loaded(facts, lambda: healthy[0])
        assert receive(ours, unpacker) == [Report(loaded=facts)]
        sinks = [RemoteSink(number, outbox, lambda number: None, lambda error: None) for number in range(64)]
        reports = []
        for step in range(20):
            tokens = [Token(step, -0.5) if step % 2 else Token(step)] * 64
            outbox.batch_started(64)
            for sink, token in zip(sinks, tokens, strict=True):
                sink.put(token)
            items = []
            while len(items) < 64:
                reports += receive(ours, unpacker)
                items += reports[-1].items
            assert items == [(number, tokens[0] if step % 2 else step) for number in range(64)]
        assert [rows for report in reports for rows in report.batches] == [64] * 20
        assert len(reports) < 40  # one for each step, unless the machine held it up in the middle
        healthy[0] = False
        assert receive(ours, unpacker) == [Report(healthy=False)]
        ours.close()
        outbox.load_changed(0, 0)  # nobody reads it; the thread ends without a word
        outbox._thread.join(5)
        assert not outbox._thread.is_alive()


@pytest.mark.parametrize(
    "error", [BusyError(7), UnsupportedError("seed", "no seeds"), NonFiniteLogitsError(), GenerationError("x"),
              ServeError("what", where="here", fix="so"), OSError(28, "No space left")], ids=repr,
)  # fmt: skip
def test_errors_are_the_same_in_the_other_process(error):
    there = pickle.loads(pickle.dumps(portable(error)))
    assert (type(there), str(there), there.args) == (type(error), str(error), error.args)
    assert {name: value for name, value in vars(there).items() if name != "__notes__"} == vars(error)


def test_an_error_that_cannot_be_pickled_is_named():
    class LocalError(Exception):  # as a panic of Rust's, whose class cannot be imported
        pass

    assert str(portable(LocalError("so"))) == "LocalError: so"


def test_messages_are_made_of_bytes_however_they_arrive():
    sent = [Report(items=[(n, n)]) for n in range(3)]
    stream, unpacker = b"".join(map(pack, sent)), Unpacker()
    assert [message for n in range(len(stream)) for message in unpacker.feed(stream[n : n + 1])] == sent
    assert Unpacker().feed(stream) == sent
    ours, its = socket.socketpair()
    with ours:
        its.sendall(stream[:-1])
        its.close()
        unpacker = Unpacker()
        assert receive(ours, unpacker) == sent[:2]
        assert receive(ours, unpacker) is None


def test_the_end_of_a_process_is_described():
    assert how_it_ended(None) == "has closed its connection"
    assert how_it_ended(1) == "ended with status 1"
    assert how_it_ended(-signal.SIGSEGV) == "was killed (SIGSEGV)"
    assert how_it_ended(-99) == "was killed (signal 99)"


def test_windows_is_told_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("nybble.serve.process.start.os.name", "nt")
    with pytest.raises(ServeError) as refused:
        start_process(LoadingJob("nothing:nothing", {}), Metrics())
    monkeypatch.undo()
    print(refused.value, refused.value.fix)
    assert "nybble serve needs Linux or macOS" in capsys.readouterr().out
