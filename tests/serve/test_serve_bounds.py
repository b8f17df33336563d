"""What one sender can take from the others: long prompts, long conversations, connections that are held; and two signals."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.data.rows.formats import Message
from nybble.data.text import spans
from nybble.data.text.template import choose_template
from nybble.data.text.tokens import count_tokens, encode_prompt, encode_text
from nybble.generate.batching import GenerationBatch
from nybble.serve import connection, encoding, guard
from nybble.serve import server as serve_server
from nybble.serve.app import Limits
from nybble.serve.encoding import Encoder, longest_token, pieces
from nybble.serve.engine import ServedModel
from nybble.serve.fields import RequestError
from nybble.serve.loading import load_pipeline
from nybble.serve.server import listen
from tests.corpus.requests import CHAT, RESPONSES, ask, chat, head, plain, post, response
from tests.local_server import serving, wait_until_ready


def make(tuned_run, cache, queue=64):
    return lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=queue, cache=cache)


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(make(tuned_run, cache)) as server:
        yield server


def address(server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def is_answered(connection: socket.socket) -> bool:
    """Read a whole answer of /health."""
    read = b""
    while not read.endswith(b"}"):
        read += connection.recv(4096)
    return read.startswith(b"HTTP/1.1 200")


def until_closed(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def roomy(server, monkeypatch):
    """The run with room for two million tokens, so that only its tokenizer is at work."""
    model = dataclasses.replace(server.engine.models["run"], positions=2_000_000)
    monkeypatch.setitem(server.engine.models, "run", model)
    return model


def test_characters_that_cannot_fit_are_refused_before_they_are_tokenised(server, monkeypatch):
    monkeypatch.setattr(encoding.Encoder, "_in_thread", lambda *words: pytest.fail("tokenised"))
    most = 512 * longest_token(server.engine.models["run"].template.tokenizer)
    for text in ("a" * (most + 1), "one two " * 450_000):
        for body, field in (
            (chat(messages=[{"role": "user", "content": text}]), "messages"),
            (plain(prompt=text), "prompt"),
        ):
            answer = server.post("/v1/completions" if field == "prompt" else CHAT, **body)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
            assert error["message"] == (
                f"the prompt has {len(text.strip()):,} characters; the context length of run is 512 tokens, "
                f"or at most {most:,} characters"
            )
    monkeypatch.undo()
    spaces = server.chat("run", "say one" + " " * most, max_tokens=2)  # the template takes these away
    assert spaces["usage"]["prompt_tokens"] < 200


def test_others_are_answered_while_a_long_prompt_is_tokenised(server, roomy):
    text = "The quick brown fox, 123 apples. " * 40_000
    answers, waits = [], []
    body = chat(messages=[{"role": "user", "content": text}], max_tokens=2_000_000)
    with httpx.Client() as client:
        client.get(f"{server.url}/health")
        thread = threading.Thread(target=lambda: answers.append(server.post(**body)))
        thread.start()
        while thread.is_alive():
            began = time.perf_counter()
            assert client.get(f"{server.url}/health").status_code == 200
            waits.append(time.perf_counter() - began)
            time.sleep(0.01)
        thread.join()
    assert answers[0].status_code == 400
    assert re.search(r"has [\d,]{7,} tokens and max_tokens is 2,000,000", answers[0].text), answers[0].text
    print(f"{len(waits)} answers meanwhile, the slowest after {max(waits):.3f} s")
    assert len(waits) > 20
    assert sorted(waits)[len(waits) * 9 // 10] < 0.2  # some may fall on another process's turn
    assert max(waits) < 1


def test_511_messages_are_read_at_once(server, roomy):
    asked = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(511)]
    began = time.perf_counter()
    answer = server.post(**chat(messages=asked, max_tokens=2_000_000))
    print(f"{time.perf_counter() - began:.2f} s")
    assert "tokens and max_tokens is 2,000,000" in answer.text
    assert time.perf_counter() - began < 2


def test_a_client_that_leaves_while_its_prompt_is_tokenised_is_dropped(server, roomy):
    text = "The quick brown fox, 123 apples. " * 60_000
    batches = server.metric("nybble_batch_rows_count")
    for stream in (False, True):
        body = json.dumps(chat(messages=[{"role": "user", "content": text}], stream=stream)).encode()
        with socket.create_connection(address(server)) as leaving:
            leaving.sendall(post(CHAT, body))
            time.sleep(0.2)
    deadline = time.monotonic() + 10
    while 'route="/v1/chat/completions",status="499"} 2.0' not in server.http.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline
    assert server.metric("nybble_batch_rows_count") == batches
    began = time.perf_counter()
    server.chat("run", "say one", max_tokens=1)
    assert time.perf_counter() - began < 3
    assert server.metric("nybble_batch_rows_count") == batches + 1


def test_a_client_that_leaves_while_waiting_gets_no_token(server, monkeypatch):
    padded, gate = server.engine.worker.generator, threading.Event()
    compute = padded._compute
    monkeypatch.setattr(padded, "_compute", lambda batch: gate.wait(20) and compute(batch))
    rows, tokens = server.metric("nybble_batch_rows_sum"), server.metric("nybble_tokens_total")
    results: dict[str, tuple[int, str]] = {}
    thread = asking(server, results, "ahead", **chat(max_tokens=1))
    server.wait_for("nybble_running", 1)
    with contextlib.ExitStack() as leaving:
        for stream in (False, True):
            waiting = leaving.enter_context(socket.create_connection(address(server)))
            waiting.sendall(post(CHAT, json.dumps(chat(max_tokens=50, stream=stream)).encode()))
        server.wait_for("nybble_waiting", 2)
    cancelled = 'nybble_answers_total{finish="cancelled",model="run"} 2.0'
    while cancelled not in server.http.get(f"{server.url}/metrics").text:
        time.sleep(0.02)
    gate.set()
    thread.join()
    assert results["ahead"][0] == 200
    server.wait_for("nybble_waiting", 0)
    assert server.metric("nybble_batch_rows_sum") == rows + 1
    used = json.loads(results["ahead"][1])["usage"]["total_tokens"]
    assert server.metric("nybble_tokens_total") == tokens + used


class Counted:
    """The encoder at work on pieces of 1,000 characters."""

    def __init__(self, tokenizer, monkeypatch, positions: int) -> None:
        self.model = ServedModel("run", choose_template(tokenizer, "alpaca", "alpaca"), positions, None, 400)
        self.counted: list[str] = []
        monkeypatch.setattr(encoding, "LONG", 5000)
        monkeypatch.setattr(encoding, "PIECE", 1000)
        monkeypatch.setattr(encoding, "count_tokens", self.count)

    def count(self, tokenizer, text):
        self.counted.append(text)
        time.sleep(0.002)
        return count_tokens(tokenizer, text)

    async def encode(self, encoder: Encoder, text: str) -> list[int]:
        return await encoder.encode(
            "prompt", self.model, [text], functools.partial(encode_text, self.model.template, text)
        )


def test_a_long_prompt_is_counted_piece_by_piece(tiny_tokenizer, monkeypatch):
    counted = Counted(tiny_tokenizer, monkeypatch, 20_000)
    fits = "one two three " * 3000
    assert asyncio.run(counted.encode(Encoder(), fits)) == encode_text(counted.model.template, fits)
    assert "".join(counted.counted) == fits.strip()
    assert len(counted.counted) < 60
    counted.counted.clear()
    asyncio.run(counted.encode(Encoder(), "one" + " " * 200_000))
    assert not counted.counted  # a template takes these away
    long = r"^the prompt has more than 2\d,\d\d\d tokens; the context length of run is 20,000 tokens$"
    with pytest.raises(RequestError, match=long):
        asyncio.run(counted.encode(Encoder(), "xyz" * 50_000))
    assert sum(map(len, counted.counted)) < 50_000


def test_a_long_prompt_that_is_given_up_stops_and_lets_others_in(tiny_tokenizer, monkeypatch):
    counted = Counted(tiny_tokenizer, monkeypatch, 1_000_000)

    async def work():
        encoder = Encoder()
        long = [asyncio.create_task(counted.encode(encoder, "one two three " * 30_000)) for _ in range(3)]
        while not counted.counted:
            await asyncio.sleep(0.001)
        await counted.encode(encoder, "one")
        behind = len(counted.counted)
        for task in long:
            task.cancel()
        await asyncio.wait(long)
        given_up = len(counted.counted)
        await counted.encode(encoder, "two three " * 1000)
        return behind, given_up

    behind, given_up = asyncio.run(work())
    assert behind < 10  # pieces of one long prompt, not those of three
    assert len(counted.counted) - given_up <= 1 + 14  # the piece at work, and those of the next prompt


@settings(max_examples=25)
@given(
    st.lists(
        st.text(max_size=40) | st.sampled_from(["one two ", "three", " ", "\n\n", "xyz" * 30, "é" * 20, "好" * 30]),
        max_size=30,
    )
)
def test_pieces_are_never_counted_for_more_than_the_whole(tiny_tokenizer, texts):
    whole = "".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PIECE", 50)
        parts = list(pieces([whole]))
    assert "".join(parts) == whole
    least = sum(max(0, count_tokens(tiny_tokenizer, part) - encoding.SLACK) for part in parts)
    assert least <= count_tokens(tiny_tokenizer, whole)


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% if loop.first %}!{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def turns(count: int, begin: int = 0) -> tuple[Message, ...]:
    return tuple(Message("user" if n % 2 == begin else "assistant", f"a{n}") for n in range(count))


@pytest.mark.parametrize("option", ["alpaca", "llama2", "chatml"])
def test_a_long_conversation_takes_time_by_its_length(option, tiny_tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    template = choose_template(tiny_tokenizer, str(file) if option == "chatml" else option, "messages")
    rendered = []
    render = template._render
    monkeypatch.setattr(
        template, "_render", lambda turns, generation=False: rendered.append(len(turns)) or render(turns, generation)
    )
    spent = {}
    for count in (511, 1023, 2047):
        rendered.clear()
        began = time.perf_counter()
        ids = encode_prompt(template, turns(count))
        print(
            f"{count} messages: {len(ids)} tokens, {time.perf_counter() - began:.2f} s, {sum(rendered)} turns rendered"
        )
        spent[count] = sum(rendered)
    assert spent[511] < 6 * 511
    assert spent[2047] < 6 * 2047
    assert template._cached_skeleton.cache_info().currsize == 0  # a client could fill the memory with them
    quick = (
        [template.runs(turns(n)) for n in (2, 40, 128, 200)],
        template.prompt_runs((Message("system", "x"), *turns(99))),
    )
    monkeypatch.setattr(spans, "MAX_RENDERED", 10**9)
    assert quick == (
        [template.runs(turns(n)) for n in (2, 40, 128, 200)],
        template.prompt_runs((Message("system", "x"), *turns(99))),
    )


@pytest.fixture
def hurried(monkeypatch):
    for stage in connection.SECONDS:
        monkeypatch.setitem(connection.SECONDS, stage, 0.4)
    monkeypatch.setattr(connection, "TURNED_AWAY", 0.4)
    monkeypatch.setattr(connection, "LINGER", 0.2)


def test_an_idle_connection_ends(server, hurried):
    with socket.create_connection(address(server), timeout=5) as idle:
        began = time.perf_counter()
        assert idle.recv(100) == b""
        assert 0.3 < time.perf_counter() - began < 3


def drip(connection: socket.socket, byte: bytes, seconds: float = 5) -> float:
    """Send a byte now and then until the other side has enough of it."""
    began = time.perf_counter()
    connection.settimeout(0.05)
    while time.perf_counter() - began < seconds:
        try:
            connection.sendall(byte)
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.perf_counter() - began


def test_headers_that_drip_in_are_given_up(server, hurried):
    with socket.create_connection(address(server)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        slow.settimeout(5)
        for _ in range(3):
            slow.sendall(b"a")
            time.sleep(0.05)
        answer = until_closed(slow)
    assert answer.startswith(b"HTTP/1.1 408")
    assert (
        json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"] == "the request's headers did not arrive in time"
    )
    with socket.create_connection(address(server)) as slow:
        assert drip(slow, b"a") < 3
    with socket.create_connection(address(server), timeout=5) as second:  # and those of a second request
        second.sendall(head("GET", "/health") + b"\r\n")
        assert is_answered(second)
        second.sendall(b"GET /hea")
        assert until_closed(second).startswith(b"HTTP/1.1 408")


def test_a_body_that_drips_in_is_given_up(server, hurried, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    start = head(Content_Type="application/json", Content_Length="1000") + b"\r\n"
    with socket.create_connection(address(server), timeout=5) as slow:
        slow.sendall(start)
        assert until_closed(slow).startswith(b"HTTP/1.1 408")
    for path in ("/nothing", "/v1/embeddings"):  # answered at once, whatever the body is
        with socket.create_connection(address(server), timeout=5) as slow:
            slow.sendall(head("POST", path, Content_Length="100000") + b"\r\n")
            assert slow.recv(4096).startswith(b"HTTP/1.1 404")
            assert drip(slow, b"a") < 3


def test_too_many_connections_get_503_and_those_before_them_are_answered(tuned_run, cache, hurried, monkeypatch):
    monkeypatch.setattr(serve_server, "CONNECTIONS", 4)
    monkeypatch.setitem(connection.SECONDS, "idle", 5)
    with serving(make(tuned_run, cache), Limits(queue=16)) as server:
        before = [socket.create_connection(address(server), timeout=5) for _ in range(20)]
        first = before[0]
        first.sendall(head("GET", "/health") + b"\r\n")
        assert is_answered(first)
        more = ask(address(server), head("GET", "/health") + b"\r\n")
        assert (more.status, more.ended) == (503, True)
        error = json.loads(more.body)["error"]
        assert (error["code"], error["message"]) == (
            "too_many_connections",
            "too many connections are open; try again in 1 s",
        )
        first.sendall(head("GET", "/health", Connection="close") + b"\r\n")
        assert until_closed(first).startswith(b"HTTP/1.1 200")
        beyond = [socket.create_connection(address(server), timeout=5) for _ in range(25)]
        began = time.perf_counter()
        with contextlib.suppress(ConnectionResetError):
            assert beyond[-1].recv(100) == b""
        assert time.perf_counter() - began < 0.35  # at once
        for each in (*before, *beyond):
            each.close()
        assert server.chat("run", "say one", max_tokens=2)["choices"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [(["Bearer s3cret"], 200), (["bearer s3cret"], 200), (["BEARER s3cret"], 200), (["Bearer   s3cret"], 200), ([], 401),
     (["s3cret"], 401), (["Bearers3cret"], 401), (["Bearer"], 401), (["Bearer s3cret x"], 401), (["Basic s3cret"], 401),
     (["Bearer S3CRET"], 401), (["Bearer \xe9"], 401), (["Bearer s3cre\xff"], 401), (["Bearer s3cret", "Bearer s3cret"], 401),
     (["Bearer wrong", "Bearer s3cret"], 401), (["Bearer Bearer s3cret"], 401)],
)  # fmt: skip
def test_a_key_follows_bearer_in_any_case(keyed, lines, status):
    authorization = "".join(f"Authorization: {line}\r\n" for line in lines).encode("latin-1")
    assert ask(address(keyed), head("GET", "/v1/models") + authorization + b"\r\n").status == status


@pytest.fixture(scope="module")
def keyed(tuned_run, cache):
    with serving(make(tuned_run, cache), key="s3cret") as server:
        yield server


def test_with_a_key_any_host_is_answered_that_is_one(keyed):
    for host, status in ((b"gpu.example:8000", 200), (b"", 200), (b"a@b", 400), (b"gpu.example:99999", 400)):
        sent = head("GET", "/v1/models", host=host, Authorization="Bearer s3cret") + b"\r\n"
        assert ask(address(keyed), sent).status == status


def asking(server, results, name, route=CHAT, chunks=None, **body):
    """Ask in a thread of its own. `chunks` gets every piece of the answer as it comes."""

    def work():
        pieces = [] if chunks is None else chunks
        with httpx.Client(timeout=30) as client, client.stream("POST", server.url + route, json=body) as answer:
            pieces.extend(answer.iter_text())
            results[name] = (answer.status_code, "".join(pieces))

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.fixture
def slow_tokens(monkeypatch):
    """A token takes 20 ms, so that answers last until all are at work, however busy the machine is."""
    step = GenerationBatch.step

    def slow(self, *args, **kwargs):
        time.sleep(0.02)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GenerationBatch, "step", slow)


@pytest.mark.usefixtures("slow_tokens")
def test_a_second_signal_cuts_off_with_an_answer_and_leaves_no_trace_in_the_log(tuned_run, cache, tiny_llama, caplog):
    long = chat(model=tiny_llama.name, max_tokens=400, temperature=0)
    results: dict[str, tuple[int, str]] = {}
    with caplog.at_level("DEBUG"), serving(make(tuned_run, cache, 16)) as server:
        answers = {
            "whole": long | {"n": 8},
            "stream": long | {"stream": True},
            "response": response(model=tiny_llama.name, max_output_tokens=400, stream=True, temperature=0),
            "waiting": long,
        }
        routes = {"response": RESPONSES}
        chunks: dict[str, list[str]] = {name: [] for name in answers}
        threads = [
            asking(server, results, name, routes.get(name, CHAT), chunks[name], **body)
            for name, body in answers.items()
        ]
        with socket.create_connection(address(server), timeout=10) as sending:
            sending.sendall(head(Content_Type="application/json", Content_Length="1000") + b"\r\n{")
            deadline = time.monotonic() + 15
            while server.metric("nybble_running") + server.metric("nybble_waiting") < 11:
                assert time.monotonic() < deadline, results
                time.sleep(0.02)
            server.server.handle_exit(signal.SIGINT, None)
            while "".join(chunks["stream"]).count("data: ") < 2:
                assert time.monotonic() < deadline, results
                time.sleep(0.02)
            assert not results
            began = time.perf_counter()
            server.server.handle_exit(signal.SIGINT, None)
            for thread in threads:
                thread.join(10)
            server.thread.join(10)
            assert time.perf_counter() - began < 5
            assert until_closed(sending).startswith(b"HTTP/1.1 503")
    for name in ("whole", "waiting"):
        status, text = results[name]
        assert (status, json.loads(text)["error"]["code"]) == (503, "shutting_down"), text
        assert json.loads(text)["error"]["message"] == "the server is shutting down"
    status, text = results["stream"]
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert (status, last["error"]["code"]) == (200, "shutting_down")
    assert text.count("data: ") > 2
    assert "event: response.failed" in results["response"][1]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


def test_a_reader_that_reads_nothing_does_not_keep_the_server(tuned_run, cache, tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(serve_server, "GRACE_PERIOD", 0.5)
    with serving(make(tuned_run, cache)) as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(address(server))
        body = chat(
            model=tiny_llama.name, n=16, max_tokens=300, stream=True, logprobs=True, top_logprobs=20, temperature=0
        )
        deaf.sendall(post(CHAT, json.dumps(body).encode()))
        server.wait_for("nybble_running", 16)
        time.sleep(1)
        began = time.perf_counter()
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert time.perf_counter() - began < 5
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


def test_after_the_first_signal_answers_have_a_limit_too(tuned_run, cache, tiny_llama):
    results: dict[str, tuple[int, str]] = {}
    with serving(make(tuned_run, cache)) as server:
        server.server.limit = 0.2
        thread = asking(server, results, "long", **chat(model=tiny_llama.name, max_tokens=400, n=8, temperature=0))
        server.wait_for("nybble_running", 8)
        server.server.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        assert results["long"][0] == 503


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_program_ends_at_the_second_signal(number, status, tuned_run, tiny_llama):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "nybble", "serve", str(tuned_run.folder), "--port", str(port), "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "100"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    wait_until_ready(url, process)
    body = chat(model=tiny_llama.name, max_tokens=400, n=16, temperature=0, stream=True)
    with httpx.stream("POST", url + CHAT, json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        for _ in range(50):
            next(lines)
        process.send_signal(number)
        time.sleep(0.3)
        process.send_signal(number)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    said, _ = process.communicate(timeout=30)
    assert process.returncode == status, said
    assert "running answers are cut off" in said
    assert not re.search(r"Traceback|Task was destroyed|CancelledError|Error", said), said
