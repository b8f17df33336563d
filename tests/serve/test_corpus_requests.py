"""Hostile requests, each with its answer; afterwards the server answers as before, and its log has no error."""

from __future__ import annotations

import json
import logging
import re
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.serve.loading import load_pipeline
from tests.corpus.cases import sampled
from tests.corpus.requests import (
    CASES,
    CHAT,
    ODD_AND_RIGHT,
    PLAIN,
    RESPONSES,
    Hostile,
    ask,
    chat,
    head,
    plain,
    response,
)
from tests.local_server import serving

CLOSING = b"\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


@pytest.fixture(scope="module")
def good(server):
    return server.chat("run", "say one", max_tokens=8, temperature=0)["choices"]


def address(server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def test_there_are_many():
    assert len(CASES) >= 300


@pytest.mark.parametrize("case", sampled(CASES, 3))
def test_a_hostile_request_gets_its_answer(case: Hostile, server, good, caplog):
    reply = ask(address(server), case.sent)
    assert reply.status == case.status, reply.body[:500]
    if not case.sent.startswith(b"HEAD"):
        error = json.loads(reply.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 700, error["message"][:1000]
        assert case.param is None or error["param"] == case.param, error
        assert case.says in error["message"], error
        print(f"{reply.status} {error['message']}")
    assert not reply.rest, "what came behind it was taken for another request"
    assert reply.ended == case.ends
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not errors, errors


@pytest.mark.parametrize("sent", [pytest.param(sent, id=name) for name, sent in ODD_AND_RIGHT])
def test_unusual_but_valid_requests_are_answered(sent, server):
    reply = ask(address(server), sent)
    assert reply.status == 200, reply.body
    assert json.loads(reply.body)["choices"]


def test_afterwards_the_server_answers_as_before(server, good):
    assert server.chat("run", "say one", max_tokens=8, temperature=0)["choices"] == good
    server.wait_for("nybble_running", 0)
    assert server.metric("nybble_waiting") == 0
    lines = server.http.get(f"{server.url}/metrics").text.splitlines()
    statuses = {line.split('status="')[1][:3] for line in lines if line.startswith("nybble_requests_total")}
    assert not [status for status in statuses if status.startswith("5")]


def test_requests_behind_each_other_are_answered_in_turn(server):
    health = head("GET", "/health") + b"\r\n"
    with socket.create_connection(address(server), timeout=20) as connection:
        connection.sendall(health + health.replace(b"/health", b"/nothing") + health.replace(b"\r\n\r\n", CLOSING))
        statuses = re.findall(rb"HTTP/1.1 (\d+)", b"".join(iter(lambda: connection.recv(65536), b"")))
    assert statuses == [b"200", b"404", b"200"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "developer", "tool"]),
        "content": st.text(max_size=20) | JSON,
    },
    optional={"name": JSON, "tool_calls": JSON, "refusal": JSON},
)
FIELDS = st.sampled_from([
    "model", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "tools", "prompt", "input",
    "stream_options", "logprobs", "top_logprobs", "metadata", "instructions", "include", "text", "logit_bias", "response_format",
])  # fmt: skip
SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(
    st.sampled_from([(CHAT, chat()), (PLAIN, plain()), (RESPONSES, response())]),
    st.dictionaries(FIELDS, JSON, max_size=3),
    st.dictionaries(st.text(max_size=8), JSON, max_size=2),
    st.none() | st.lists(MESSAGE, max_size=4),
)
def test_whatever_is_sent_is_answered_or_refused(server, base, known, unknown, messages):
    route, body = base
    body = {**body, **known, **unknown, **({} if messages is None else {"messages": messages})}
    answer = server.http.post(
        server.url + route, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@SETTINGS
@given(st.binary(max_size=200))
def test_whatever_bytes_are_sent_the_body_is_answered_or_refused(server, body):
    answer = server.http.post(server.url + CHAT, content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code == 400, answer.text
