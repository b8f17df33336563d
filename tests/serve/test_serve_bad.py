"""Requests that are wrong, and what their errors say; tests/corpus/requests.py has many more."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket

import pytest

from nybble.data.text.template import choose_template
from nybble.serve.loading import load_pipeline
from tests.local_server import serving

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


def check_error(response, status, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param
    return error


def test_a_misspelled_field_gets_a_suggestion(server):
    error = check_error(server.post(**chat(temprature=0.5)), 400, "temprature")
    assert error["message"] == "there is no field temprature; did you mean temperature?"
    assert error["code"] == "unknown_parameter"


def test_too_long_a_prompt_says_how_long_it_is(server):
    error = check_error(server.post(**chat(max_tokens=500)), 400)
    assert error["code"] == "context_length_exceeded"
    assert "and max_tokens is 500; the context length of run is 512 tokens" in error["message"]


def test_values_that_change_nothing_are_accepted(server):
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
