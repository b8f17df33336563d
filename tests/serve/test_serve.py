"""The local API on a tiny run: real requests over loopback, with OpenAI's own client and without."""

from __future__ import annotations

import functools
import io
import json
import logging
import socket
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
import typer
from transformers import AutoTokenizer
from typer.main import get_command

from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.cli import using
from nybble.cli.app import app
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode, encode_prompt
from nybble.errors import RunError, ServeError
from nybble.generate.cache import cache_tokens
from nybble.run.folder import open_run
from nybble.serve.app import Limits
from nybble.serve.loading import load_pipeline, run_names
from nybble.serve.metrics import Metrics
from nybble.serve.server import Address, listen, read_key, serve, short_switch_interval
from tests.local_server import another_run, events, serving

ASKED = "say one two 3"
CLOSE_CALL = (
    1e-3  # nats between the two likeliest tokens; float32 logits of a batch differ by 1e-5 from those of one row
)


@pytest.fixture(scope="module")
def runs(tuned_run):
    return [tuned_run, another_run(tuned_run, "strong", 3.0)]


@pytest.fixture(scope="module")
def server(runs, cache):
    with serving(lambda metrics: load_pipeline(runs, metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


def user(text):
    return [{"role": "user", "content": text}]


def test_openais_client_lists_the_models_and_gets_an_answer(client, tiny_llama):
    base = tiny_llama.name
    assert [model.id for model in client.models.list()] == ["run", "strong", base]
    assert client.models.retrieve("run").to_dict()["parent"] == base
    answer = client.chat.completions.create(model="run", messages=user(ASKED), max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 12


def test_a_stream_says_the_same_as_the_whole_answer(client):
    ask = {"model": "strong", "messages": user(ASKED), "max_tokens": 40, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_an_answer_is_that_of_chat_and_the_prompt_is_that_of_training(server, runs, cache, monkeypatch):
    seen = []
    submit = server.engine.worker.submit
    monkeypatch.setattr(server.engine.worker, "submit", lambda asked, sinks: seen.extend(asked) or submit(asked, sinks))
    said = server.chat("run", f"  {ASKED}</s> <unk>", max_tokens=20, temperature=0)["choices"][0]["message"]["content"]
    answerer = load_answerer(runs[0], cache, "cpu")
    turns = (Message("user", f"{ASKED}</s> <unk>"),)
    assert said == answerer.answer([turns], Sampling(max_new_tokens=20))[0]
    prompt = encode_prompt(answerer.template, turns)
    (trained,) = encode(answerer.template, [(*turns, Message("assistant", "one"))])
    assert seen[0].prompt == prompt == trained.ids[: trained.trained.index(True)]
    assert prompt.count(answerer.tokenizer.eos_token_id) == 0  # what a user writes is never a control token
    assert prompt.count(answerer.tokenizer.bos_token_id) == 1


def test_every_run_answers_with_its_own_adapter_and_the_base_with_none(server, runs, cache, tiny_llama):
    for run in runs:
        alone = load_answerer(run, cache, "cpu")
        (expected,) = alone.answer([(Message("user", ASKED),)], Sampling(max_new_tokens=12))
        assert (
            server.chat(run.folder.name, ASKED, max_tokens=12, temperature=0)["choices"][0]["message"]["content"]
            == expected
        )
    with alone.as_base():
        (plain,) = alone.answer([(Message("user", ASKED),)], Sampling(max_new_tokens=12))
    ask = {"max_tokens": 12, "temperature": 0}
    texts = [
        server.chat(name, ASKED, **ask)["choices"][0]["message"]["content"]
        for name in ("run", "strong", tiny_llama.name)
    ]
    assert texts[2] == plain
    assert len(set(texts)) == 3


def parting(one, other) -> float | None:
    """Nats between the two likeliest tokens where two greedy answers part; None where they are the same."""
    for mine, its in zip(one, other, strict=False):
        if mine["token"] != its["token"]:
            first, second = mine["top_logprobs"][:2]
            return first["logprob"] - second["logprob"]
    return None


def logprobs(answer):
    return answer["choices"][0]["logprobs"]["content"]


def test_64_requests_at_16_at_once_are_each_answered_as_alone(server):
    """The load run; `pytest -m slow tests/serve/test_serve_real.py` has 500 requests on real weights."""
    ask = {"max_tokens": 16, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    texts = [f"say {'one two red ' * (n % 4)}{n % 16}" for n in range(64)]
    alone = {text: server.chat("run", text, **ask) for text in set(texts)}
    batches, rows = server.metric("nybble_batch_rows_count"), server.metric("nybble_batch_rows_sum")
    together: dict[int, dict] = {}
    places = iter(range(64))

    def work():
        for n in places:
            together[n] = server.chat("run", texts[n], **ask)

    threads = [threading.Thread(target=work) for _ in range(16)]
    before = threading.active_count()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 64
    gaps = [gap for n, answer in together.items() if (gap := parting(logprobs(answer), logprobs(alone[texts[n]])))]
    assert all(gap < CLOSE_CALL for gap in gaps), gaps
    assert len(gaps) < 8
    mean = (server.metric("nybble_batch_rows_sum") - rows) / (server.metric("nybble_batch_rows_count") - batches)
    print(f"mean batch {mean:.1f}; {len(gaps)} answers part at a close call")
    assert mean > 2
    server.wait_for("nybble_running", 0)
    assert server.metric("nybble_waiting") == 0
    assert threading.active_count() == before


def test_a_seeded_answer_does_not_depend_on_its_neighbours(server):
    ask = {"max_tokens": 24, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
    alone = server.chat("run", ASKED, seed=7, **ask)["choices"][0]["message"]["content"]
    answers = {}

    def work(seed):
        answers[seed] = server.chat("run", ASKED, seed=seed, **ask)["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[7] == alone
    assert len(set(answers.values())) > 4
    below = server.chat("run", ASKED, seed=-1, n=3, **ask)["choices"]  # seeds -1, 0 and 1
    assert len({choice["message"]["content"] for choice in below}) == 3


def test_log_probabilities_are_the_models_own(server, runs, cache, client):
    answer = client.chat.completions.create(
        model="run", messages=user(ASKED), max_tokens=6, temperature=0.7, seed=1, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    answerer = load_answerer(runs[0], cache, "cpu")
    prompt = encode_prompt(answerer.template, (Message("user", ASKED),))
    raw = bytes(byte for token in content for byte in token.bytes)
    assert raw.decode(errors="replace").strip() == answer.choices[0].message.content
    with torch.inference_mode():
        logits = answerer.model(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    best = logits.topk(3)
    assert [token.logprob for token in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    chosen = [i for i in range(len(answerer.tokenizer)) if answerer.tokenizer.decode([i]) == content[0].token]
    assert any(content[0].logprob == pytest.approx(float(logits[i]), abs=1e-4) for i in chosen)


def test_plain_completions_go_on_from_text_and_from_ids(client, runs):
    ask = {"model": "strong", "max_tokens": 8, "temperature": 0}
    from_text = client.completions.create(**ask, prompt="one two three", logprobs=2)
    ids = load_tokens("one two three", runs[0])
    from_ids = client.completions.create(**ask, prompt=ids)
    both = client.completions.create(**ask, prompt=["one two three", "red cat"], n=2)
    assert from_text.choices[0].text == from_ids.choices[0].text == both.choices[0].text == both.choices[1].text
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    shown = from_text.choices[0].logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset)
    streamed = list(client.completions.create(**ask, prompt="one two three", stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == from_text.choices[0].text
    assert streamed[-1].choices[0].finish_reason == from_text.choices[0].finish_reason


def load_tokens(text, run):
    return AutoTokenizer.from_pretrained(run.folder / "tokenizer")(text)["input_ids"]


def test_a_stop_string_ends_the_answer_and_does_not_show(server, tiny_llama):
    ask = {"max_tokens": 60, "seed": 3}
    free = server.chat(tiny_llama.name, ASKED, **ask)["choices"][0]["message"]["content"]
    stop = free[7:12]  # in the middle, over borders of tokens
    answer = server.chat(tiny_llama.name, ASKED, **ask, stop=["never said", stop])
    assert answer["choices"][0]["message"]["content"] == free[: free.index(stop)].strip()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 60
    body = {"model": tiny_llama.name, "messages": user(ASKED), "stream": True, "stop": stop, **ask}
    with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        parts = [event["choices"][0]["delta"].get("content", "") for event in events(response.iter_lines())]
    assert "".join(parts) == answer["choices"][0]["message"]["content"]
    assert len([part for part in parts if part]) > 1  # it came in pieces, although a stop string was waited for


def long_answer(model, **more):
    """A request that takes 300 tokens: the likeliest of the random base go round in a circle."""
    return {"model": model, "messages": user("go on"), "max_tokens": 300, "stream": True, "temperature": 0, **more}


def test_a_reader_that_leaves_ends_the_generation(server, tiny_llama):
    cancelled, made = server.metric("nybble_answers_total"), server.metric("nybble_tokens_total")
    with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=long_answer(tiny_llama.name)) as response:
        lines = response.iter_lines()
        for _ in range(4):  # who speaks, a blank line, a first token
            next(lines)
        assert server.metric("nybble_running") == 1
    server.wait_for("nybble_running", 0, 3)
    text = server.http.get(f"{server.url}/metrics").text
    assert f'nybble_answers_total{{finish="cancelled",model="{tiny_llama.name}"}} 1.0' in text
    assert server.metric("nybble_answers_total") == cancelled + 1
    assert server.metric("nybble_tokens_total") > made
    with pytest.raises(httpx.ReadTimeout):  # not streamed: it leaves while the answer is made
        server.post(**(long_answer(tiny_llama.name) | {"stream": False}), timeout=0.2)
    server.wait_for("nybble_running", 0, 3)
    assert server.metric("nybble_answers_total") == cancelled + 2


def test_a_long_answer_gives_way_and_goes_on_as_it_would_have(server, tiny_llama):
    body = long_answer(tiny_llama.name, n=2, max_tokens=120)
    alone = server.post(**(body | {"stream": False})).json()["choices"]
    batches = server.metric("nybble_batch_rows_count")
    with server.http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        first = [next(lines) for _ in range(6)]
        began = time.perf_counter()
        server.chat("run", ASKED, max_tokens=4)  # another model, which joins the batch that follows
        waited = time.perf_counter() - began
        assert server.metric("nybble_running") >= 2  # and the long one has not ended
        parts = events([*first, *lines])
    assert server.metric("nybble_batch_rows_count") >= batches + 2
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts if part["choices"][0]["index"] == 0)
    same = len([1 for one, other in zip(text, alone[0]["message"]["content"], strict=False) if one == other])
    assert same > 0.9 * len(text) or text[:100] == alone[0]["message"]["content"][:100]
    print(f"waited {waited:.2f} s")


def slow_reader(server, body) -> socket.socket:
    """A connection that has asked, and reads the first bytes of the answer only."""
    host, port = server.url.removeprefix("http://").split(":")
    sent = json.dumps(body).encode()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect((host, int(port)))
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    slow.sendall("\r\n".join([*lines, f"Content-Length: {len(sent)}", "", ""]).encode() + sent)
    assert slow.recv(20).startswith(b"HTTP/1.1 200")
    return slow


def test_a_reader_that_reads_slowly_holds_nobody_up(server, tiny_llama):
    body = long_answer(tiny_llama.name, n=8, logprobs=True, top_logprobs=20, max_tokens=150)
    with slow_reader(server, body):
        server.wait_for("nybble_running", 8)
        began = time.perf_counter()
        server.chat("run", ASKED, max_tokens=4)
        assert time.perf_counter() - began < 10
        server.wait_for("nybble_running", 0, 60)  # made whole, though nobody reads it
        assert server.chat("run", ASKED, max_tokens=4)["choices"]


@pytest.mark.slow
def test_an_answer_that_is_not_read_is_cancelled_at_the_time_limit(runs, cache, tiny_llama):
    make = lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=64, cache=cache)  # noqa: E731
    with serving(make, Limits(timeout=1)) as server:
        body = long_answer(tiny_llama.name, n=16, logprobs=True, top_logprobs=20)  # 6 MB, more than the kernel holds
        with slow_reader(server, body):
            server.wait_for("nybble_answers_total", 16, 30)
            text = server.http.get(f"{server.url}/metrics").text
            assert 'finish="timeout"' in text
        assert server.chat("run", ASKED, max_tokens=4)["choices"]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_a_reader_that_never_reads_is_cut_off(monkeypatch):
    monkeypatch.setattr("nybble.serve.server.UNREAD_TIMEOUT", 1)
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted, pytest.raises(TimeoutError):
            accepted.sendall(bytes(50_000_000))


def test_an_answer_that_takes_too_long_is_cancelled(runs, cache, tiny_llama):
    make = lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=64, cache=cache)  # noqa: E731
    with serving(make, Limits(timeout=0.3)) as server:
        late = server.post(**(long_answer(tiny_llama.name, n=16) | {"stream": False}))
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        with client, pytest.raises(openai.APIError, match=r"not done within 0\.3 s"):
            list(client.chat.completions.create(**long_answer(tiny_llama.name, n=16)))
        server.wait_for("nybble_running", 0, 5)
        ends = f'nybble_answers_total{{finish="timeout",model="{tiny_llama.name}"}} 32.0'
        assert ends in server.http.get(f"{server.url}/metrics").text


def test_a_server_that_ends_lets_running_answers_finish(runs, cache, tiny_llama):
    with serving(lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=64, cache=cache)) as server:
        with server.http.stream(
            "POST", f"{server.url}/v1/chat/completions", json=long_answer(tiny_llama.name)
        ) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.server.should_exit = True
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")
            parts = events([first, *lines])
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert len(parts) > 100
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_a_model_that_fails_fails_its_own_requests_only(runs, cache, monkeypatch):
    with serving(lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=64, cache=cache)) as server:
        model = server.engine.worker.generator.model.get_base_model()
        forward, calls = model.forward, []

        def failing(*words, **named):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("device-side assert")
            if len(calls) == 8:
                raise torch.OutOfMemoryError("too much")
            return forward(*words, **named)

        monkeypatch.setattr(model, "forward", failing)
        failed = server.post(model="run", messages=user(ASKED), max_tokens=30, seed=1)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
        assert "device-side" not in failed.text
        both = server.chat("run", ASKED, max_tokens=30, seed=1, n=2, temperature=1.5)  # out of memory: one at a time
        assert len(both["choices"]) == 2
        batches = server.metric("nybble_batch_rows_count")
        short = {"route": "/v1/completions", "model": "run", "prompt": ["one", "two"], "max_tokens": 2}
        assert server.post(**short).status_code == 200
        assert server.metric("nybble_batch_rows_count") == batches + 1  # short ones still go together

        def overflowing(*words, **named):
            output = forward(*words, **named)
            output.logits[0] = torch.nan
            return output

        monkeypatch.setattr(model, "forward", overflowing)
        failed = server.post(**short, logprobs=1)
        assert failed.status_code == 503
        assert "logits are infinite or NaN" in failed.json()["error"]["message"]
        assert 'finish="failed",model="run"} 3.0' in server.http.get(f"{server.url}/metrics").text
        assert server.http.get(f"{server.url}/health").json()["status"] == "ok"


def test_an_engine_that_broke_down_says_so(runs, cache, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with serving(lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=64, cache=cache)) as server:
        monkeypatch.setattr(server.engine.worker.generator, "_compute", lambda batch: 1 / 0)
        failed = server.post(model="run", messages=user(ASKED))
        assert failed.status_code == 503
        assert server.http.get(f"{server.url}/health").status_code == 503
        assert server.post(model="run", messages=user(ASKED)).json()["error"]["message"] == "the engine failed"


def test_a_key_is_asked_for_and_the_page_needs_none(runs, cache):
    with serving(lambda m: load_pipeline(runs[:1], m, device="cpu", queue=4, cache=cache), key="s3cret") as server:
        assert (
            server.http.get(f"{server.url}/").status_code == server.http.get(f"{server.url}/health").status_code == 200
        )
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Bearer s3cret2"},
            {"X-Api-Key": "s3cret"},
        ):
            for route in ("/v1/models", "/metrics", "/nothing"):
                refused = server.http.get(server.url + route, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret") as good:
            assert good.chat.completions.create(model="run", messages=user(ASKED), max_tokens=2).choices
        bad = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong")
        with bad, pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
            bad.models.list()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("127.8.8.8", 200), ("evil.example", 403), ("", 403),
     ("localhost.evil.example", 403), ("10.0.0.1:8000", 403)],
)  # fmt: skip
def test_without_a_key_only_this_machines_names_are_answered(server, host, status):
    assert server.http.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == status


def test_nothing_of_a_prompt_is_logged_unless_asked(runs, cache, caplog):
    logging.getLogger("nybble.serve").propagate = True
    for wanted in (False, True):
        caplog.clear()
        make = lambda metrics: load_pipeline(runs[:1], metrics, device="cpu", queue=4, cache=cache)  # noqa: E731
        with caplog.at_level("INFO"), serving(make, Limits(log_prompts=wanted)) as server:
            server.chat("run", "say the password red", max_tokens=3)
            assert server.post(model="run", messages=[{"role": "user", "content": {"password": 1}}]).status_code == 400
            assert server.post(model="password", messages=user("x")).status_code == 404
        assert ("password" in caplog.text) == wanted
        assert "run: " in caplog.text


def test_runs_that_cannot_be_served_together_are_named(runs, cache, tmp_path):
    with pytest.raises(RunError, match=r"two runs have the name run"):
        run_names([runs[0], another_run(open_run(runs[0].folder), "elsewhere/run", 1.0)])
    other = another_run(runs[0], "other-base", 1.0)
    recipe = (other.folder / "recipe.yaml").read_text().replace("quantization: nf4", "quantization: none")
    (other.folder / "recipe.yaml").write_text(recipe)
    start = json.loads((other.folder / "start.json").read_text())
    start["recipe"]["model"]["quantization"] = "none"
    (other.folder / "start.json").write_text(json.dumps(start))
    with pytest.raises(RunError, match=r"2 different bases.*\n.*run on .*nf4.*\n.*other-base on .*none"):
        load_pipeline([runs[0], open_run(other.folder)], Metrics(), device="cpu", queue=1, cache=cache)


def test_the_memory_that_is_free_bounds_a_batch(server):
    model = server.engine.worker.generator.model.get_base_model()
    assert cache_tokens(model) > 1000
    scheduler = server.engine.worker.generator.scheduler
    scheduler.token_budget, kept = 300, scheduler.token_budget  # two rows of 97 + 30 tokens
    before = server.metric("nybble_batch_rows_count")
    try:
        server.chat("run", ASKED, max_tokens=12, n=4, temperature=0)
    finally:
        scheduler.token_budget = kept
    assert server.metric("nybble_batch_rows_count") == before + 2


def test_a_thread_that_sends_waits_only_briefly_for_one_that_computes():
    def seconds_of_thirty_turns():
        over = threading.Event()

        def compute():
            while not over.is_set():
                sum(range(50))

        thread = threading.Thread(target=compute)
        thread.start()
        began = time.perf_counter()
        for _ in range(30):
            time.sleep(0)
        seconds = time.perf_counter() - began
        over.set()
        thread.join()
        return seconds

    before = sys.getswitchinterval()
    usual = seconds_of_thirty_turns()
    with short_switch_interval():
        short = min(seconds_of_thirty_turns() for _ in range(3))
    print(usual, short)
    assert short < usual / 3
    assert sys.getswitchinterval() == before


def test_what_keeps_a_server_from_starting_is_reported(runs, quiet):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port {port} of 127.0.0.1 is already in use[\s\S]*--port {port + 1}"):
            listen("127.0.0.1", port)
    start = functools.partial(serve, runs[:1], console=quiet, device="cpu", limits=Limits())
    with pytest.raises(
        ServeError, match=r"--host 0.0.0.0 lets other machines in, but there is no API key[\s\S]*--api-key-file"
    ):
        start(Address("0.0.0.0"), engine="pipeline")
    with pytest.raises(ServeError, match=r"no.such.host is not an address"):
        start(Address("no.such.host"), engine="pipeline")
    with pytest.raises(ServeError, match="there is no engine 'fast'"):
        start(Address(), engine="fast")
    with pytest.raises(ServeError, match=r"cannot listen on 192.0.2.1, port 0: Cannot assign"):
        listen("192.0.2.1", 0)


def test_a_missing_package_is_named(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "nybble.serve.app")
    with pytest.raises(ServeError, match=r"needs packages that are not installed[\s\S]*pip install .*\[serve\]"):
        using.serve(typer.Context(get_command(app)), [runs[0].folder])


def test_a_key_comes_from_an_option_a_file_or_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "key.txt"
    file.write_text("abc-123\nnothing\n")
    assert read_key("abc", None) == "abc"
    assert read_key(None, None) is None
    assert read_key(None, file) == "abc-123"
    monkeypatch.setattr(sys, "stdin", io.StringIO("from-stdin\n"))
    assert read_key(None, type(file)("-")) == "from-stdin"
    for wrong in ("", "a b", "ключ", "a\nb"):
        with pytest.raises(ServeError, match="printable ASCII"):
            read_key(wrong, None)
    for text in (b"\xff\xfe" + "abc-123\r\n".encode("utf-16-le"), b"\xef\xbb\xbfabc-123\n"):  # as Windows writes it
        file.write_bytes(text)
        assert read_key(None, file) == "abc-123"
    for content in (
        "schl\u00fcssel".encode("cp1252"),
        b"\xff\xfea",
        b"",
        b"\n",
        "abc".encode("utf-16-be"),
        b"\xef\xbb\xbf",
    ):
        file.write_bytes(content)
        with pytest.raises(ServeError, match=r"UTF-8 text|printable ASCII") as caught:
            read_key(None, file)
        print(caught.value)
        assert caught.value.where == str(file)
        assert "--api-key-file key.txt" in caught.value.fix
    with pytest.raises(ServeError, match="printable ASCII"):  # of which a shell may make one without end
        read_key(None, type(file)("/dev/zero"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"schl\xfcssel\n"), encoding="utf-8"))
    with pytest.raises(ServeError, match=r"UTF-8 text[\s\S]*standard input"):
        read_key(None, type(file)("-"))
    with pytest.raises(ServeError, match="both given"):
        read_key("a", file)
    with pytest.raises(ServeError, match="cannot be read"):
        read_key(None, tmp_path / "missing")
