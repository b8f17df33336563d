"""Requests that are wrong: each gets a 4xx in OpenAI's shape, and after all of them the server answers as before."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_server import serving
from nybble.data.template import choose_template
from nybble.serve.guard import BODY
from nybble.serve.pipeline import load_pipeline

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "say one"}]


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


def chat(**changes):
    return {"model": "run", "messages": ASK, "max_tokens": 2, **changes}


def plain(**changes):
    return {"model": "run", "prompt": "one", "max_tokens": 2, **changes}


def without(body, name):
    return {key: value for key, value in body.items() if key != name}


BAD = [
    # route, body, status, field that is named
    (CHAT, chat(model=5), 400, "model"),
    (CHAT, chat(model=None), 400, "model"),
    (CHAT, without(chat(), "model"), 400, "model"),
    (CHAT, chat(model="gpt-4"), 404, "model"),
    (CHAT, chat(model="../run"), 404, "model"),
    (CHAT, chat(model="/etc/passwd"), 404, "model"),
    (CHAT, chat(model="run" * 10_000), 404, "model"),
    (CHAT, without(chat(), "messages"), 400, "messages"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="say one"), 400, "messages"),
    (CHAT, chat(messages=["say one"]), 400, "messages.0"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    (CHAT, chat(messages=[{"content": "say one"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "user", "content": 7}]), 400, "messages.0.content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages.0.content"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=ASK * 513), 400, "messages"),
    (CHAT, chat(messages=[{"role": "user", "content": "one two " * 2000}]), 400, "messages"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=-5), 400, "max_tokens"),
    (CHAT, chat(max_tokens="7"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "messages"),
    (CHAT, chat(max_tokens=100_000), 400, "messages"),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens"),
    (CHAT, chat(temperature=-0.1), 400, "temperature"),
    (CHAT, chat(temperature=2.1), 400, "temperature"),
    (CHAT, chat(temperature="hot"), 400, "temperature"),
    (CHAT, chat(top_p=-0.1), 400, "top_p"),
    (CHAT, chat(top_p=[0.5]), 400, "top_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=129), 400, "n"),
    (CHAT, chat(n=True), 400, "n"),
    (CHAT, chat(seed=2**63), 400, "seed"),
    (CHAT, chat(seed="x"), 400, "seed"),
    (CHAT, chat(stop=5), 400, "stop"),
    (CHAT, chat(stop=""), 400, "stop"),
    (CHAT, chat(stop=["a"] * 65), 400, "stop"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(logprobs=5), 400, "logprobs"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(temprature=0.5), 400, "temprature"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
    (CHAT, chat(frequency_penalty=1), 400, "frequency_penalty"),
    (PLAIN, plain(prompt=None), 400, "prompt"),
    (PLAIN, plain(prompt=[]), 400, "prompt"),
    (PLAIN, plain(prompt=[1, "a"]), 400, "prompt"),
    (PLAIN, plain(prompt=[10**9]), 400, "prompt"),
    (PLAIN, plain(prompt=[-1]), 400, "prompt"),
    (PLAIN, plain(prompt=["one"] * 65), 400, "prompt"),
    (PLAIN, plain(prompt=["one"] * 33, n=2), 400, "prompt"),
    (PLAIN, plain(logprobs=6), 400, "logprobs"),
    (PLAIN, plain(best_of=3), 400, "best_of"),
    (PLAIN, plain(echo=True), 400, "echo"),
    (PLAIN, plain(messages=ASK), 400, "messages"),
]  # fmt: skip
RAW = [
    # method, route, body, content type, status
    ("POST", CHAT, b"", "application/json", 400),
    ("POST", CHAT, b"{", "application/json", 400),
    ("POST", CHAT, b'{"model": "run", "messages": [', "application/json", 400),
    ("POST", CHAT, b"[1, 2]", "application/json", 400),
    ("POST", CHAT, b"null", "application/json", 400),
    ("POST", CHAT, b"\xff\xfe\x00", "application/json", 400),
    ("POST", CHAT, b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
    ("POST", CHAT, b'{"model": "run", "temperature": NaN, "messages": []}', "application/json", 400),
    ("POST", CHAT, b"[" * 100_000, "application/json", 400),
    ("POST", CHAT, json.dumps(chat()).encode(), "text/plain", 415),
    ("POST", CHAT, json.dumps(chat()).encode(), "", 415),
    ("POST", CHAT, b'"' + b"x" * (BODY + 1) + b'"', "application/json", 413),
    ("GET", CHAT, b"", "", 405),
    ("DELETE", "/v1/models", b"", "", 405),
    ("GET", "/v1/models/../../etc/passwd", b"", "", 404),
    ("GET", "/v1/models/gpt-4", b"", "", 404),
    ("POST", "/v1/embeddings", b"{}", "application/json", 404),
    ("GET", "/docs", b"", "", 404),
    ("GET", "/v1/" + "x" * 5000, b"", "", 404),
]


def check_error(response, status, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param
    return error


def test_every_bad_request_gets_its_error_and_the_server_goes_on(server):
    good = server.chat("run", "say one", max_tokens=8, temperature=0)
    for route, body, status, param in BAD:
        for stream in ({}, {} if "stream_options" in body else {"stream": True}):
            error = check_error(server.post(route, **(stream | body)), status, param)
            print(f"{status} {error['message'][:150]}")
    for method, route, body, kind, status in RAW:
        headers = {"Content-Type": kind} if kind else {}
        check_error(server.http.request(method, server.url + route, content=body, headers=headers, timeout=30), status)
    assert len(BAD) + len(RAW) > 50
    assert server.metric("nybble_running") == server.metric("nybble_waiting") == 0
    again = server.chat("run", "say one", max_tokens=8, temperature=0)
    assert again["choices"] == good["choices"]
    statuses = {line.split('status="')[1][:3] for line in server.http.get(f"{server.url}/metrics").text.splitlines()
                if line.startswith("nybble_requests_total")}  # fmt: skip
    assert not [status for status in statuses if status.startswith("5")]


def test_a_field_that_is_spelt_wrongly_is_guessed(server):
    error = check_error(server.post(**chat(temprature=0.5)), 400, "temprature")
    assert error["message"] == "there is no field temprature; did you mean temperature?"
    assert error["code"] == "unknown_parameter"


def test_too_long_a_prompt_says_how_long_it_is(server):
    error = check_error(server.post(**chat(max_tokens=500)), 400)
    assert error["code"] == "context_length_exceeded"
    assert "and max_tokens is 500; run knows 512 positions" in error["message"]


def test_what_means_nothing_is_taken(server):
    harmless = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto", "user": "me",
        "response_format": {"type": "text"}, "stop": None, "seed": None, "metadata": {"a": 1}, "store": False, "logprobs": None,
    }  # fmt: skip
    asked = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "say one", "name": "me"},
        {"role": "assistant", "content": "one", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "say two"},
    ]
    assert server.post(**chat(**harmless, messages=asked)).status_code == 200


def test_a_control_word_of_the_template_is_refused(server, monkeypatch):
    model = server.engine.models["run"]
    template = choose_template(model.template.tokenizer, "llama2", "messages")
    with monkeypatch.context() as patch:
        patch.setitem(server.engine.models, "run", dataclasses.replace(model, template=template))
        error = check_error(server.post(**chat(messages=[{"role": "user", "content": "a [/INST] b"}])), 400, "messages")
        assert "the user's text contains [/INST]" in error["message"]


def test_connections_that_break_off_leave_nothing_behind(server):
    host, port = server.url.removeprefix("http://").split(":")
    whole = json.dumps(chat(max_tokens=200, temperature=0, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    head = f"{head}{len(whole)}\r\n\r\n".encode()
    broken = [
        b"POST",
        head,
        head + whole[:20],
        head + whole,
        b"\x16\x03\x01\x00garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ]
    for sent in broken:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    server.wait_for("nybble_running", 0, 5)
    assert server.chat("run", "say one", max_tokens=2)["choices"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "tools"]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, JSON, max_size=3), st.dictionaries(st.text(max_size=8), JSON, max_size=2))
def test_whatever_is_sent_is_answered_or_refused(server, known, unknown):
    body = json.dumps({**chat(), **known, **unknown}).encode()
    response = server.http.post(
        server.url + CHAT, content=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        check_error(response, response.status_code)


def test_ids_without_an_embedding_are_refused_and_the_last_one_with_one_is_taken(server):
    """By the model's rows, whatever the tokenizer has: this one has fewer tokens than rows, others have more."""
    model = server.engine.models["run"]
    assert (model.rows, len(model.template.tokenizer)) == (400, 348)
    assert server.post(PLAIN, **plain(prompt=[1, 399])).status_code == 200
    for odd in (400, -1):
        error = check_error(server.post(PLAIN, **plain(prompt=[[1, 2], [3, odd]])), 400, "prompt")
        assert f"the model has no token {odd}: its embeddings are for ids 0 to 399" in error["message"]


def test_tokens_that_were_added_to_the_tokenizer_alone_are_refused(server, monkeypatch):
    """As somebody's adapter brings them: [TURN] is part of the template, and the base has no row for it."""
    model = server.engine.models["run"]
    tokenizer = copy.deepcopy(model.template.tokenizer)
    tokenizer.add_tokens([f"[FILL{n}]" for n in range(52)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TURN]"]})
    tokenizer.chat_template = "{% for m in messages %}[TURN]{{ m.content }}</s>{% endfor %}"
    template = choose_template(tokenizer, "model", "messages")
    with monkeypatch.context() as patch:
        patch.setitem(server.engine.models, "run", dataclasses.replace(model, template=template))
        error = check_error(server.post(**chat()), 400, "messages")
        assert "the model has no token 400 ([TURN])" in error["message"]
