"""The Responses API in its plain text form, by OpenAI's own client; its events held against that client's types."""

from __future__ import annotations

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from nybble.serve.app import Limits
from nybble.serve.loading import load_pipeline
from tests.local_server import serving

ASKED = "say one two 3"
GREEDY = {"model": "run", "temperature": 0}
EVENT = TypeAdapter(ResponseStreamEvent)
ORDER = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
END = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


def sent(server, **body):
    """The events of a stream as they come over the wire: (name, body) each."""
    with server.http.stream("POST", f"{server.url}/v1/responses", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.read().decode().strip().split("\n\n")
    pairs = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_a_text_is_answered_as_a_chat_would(server, client):
    chat = server.chat("run", ASKED, max_tokens=40, temperature=0)
    answer = client.responses.create(**GREEDY, input=ASKED, max_output_tokens=40, metadata={"job": "7"})
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    ended = chat["choices"][0]["finish_reason"] == "length"
    assert answer.status == ("incomplete" if ended else "completed")
    assert answer.metadata == {"job": "7"}
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert answer.usage.total_tokens == chat["usage"]["total_tokens"]
    assert answer.id.startswith("resp_")
    assert (answer.output[0].type, answer.output[0].role) == ("message", "assistant")
    raw = server.post("/v1/responses", **GREEDY, input=ASKED, max_output_tokens=1).json()
    Response.model_validate(raw)
    assert (raw["status"], raw["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert raw["output"][0]["status"] == "incomplete"
    assert raw["usage"]["output_tokens"] == 1


def test_instructions_and_parts_are_a_conversation(server, client, monkeypatch):
    seen = []
    submit = server.engine.worker.submit
    monkeypatch.setattr(server.engine.worker, "submit", lambda asked, sinks: seen.extend(asked) or submit(asked, sinks))
    first = client.responses.create(**GREEDY, instructions="be brief", input=ASKED, max_output_tokens=8)
    said = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASKED}]},
        *first.output,
        {"role": "user", "content": "red"},
    ]
    client.responses.create(**GREEDY, instructions="be brief", input=said, max_output_tokens=8)
    developer = [{"role": "developer", "content": "be kind"}, *said]
    client.responses.create(**GREEDY, instructions="be brief", input=developer, max_output_tokens=8)
    client.responses.create(**GREEDY, input=said[:2], max_output_tokens=8)
    own = [list(request.prompt) for request in seen]
    seen.clear()
    turns = [("user", ASKED), ("assistant", first.output_text), ("user", "red")]
    chats = [
        [("system", "be brief"), *turns[:1]], [("system", "be brief"), *turns], [("system", "be brief\n\nbe kind"), *turns],
        turns[:2],
    ]  # fmt: skip
    for chat in chats:
        messages = [{"role": role, "content": text} for role, text in chat]
        assert server.post(model="run", messages=messages, max_tokens=2).status_code == 200
    assert own == [request.prompt for request in seen]


def test_a_stream_has_openais_events_in_openais_order(server):
    for limit, end in ((1, "response.incomplete"), (100, "response.completed")):
        whole = server.post("/v1/responses", **GREEDY, input=ASKED, max_output_tokens=limit).json()
        pairs = sent(server, **GREEDY, input=ASKED, max_output_tokens=limit)
        names = [name for name, _ in pairs]
        deltas = [body for name, body in pairs if name == "response.output_text.delta"]
        assert names == [*ORDER, *["response.output_text.delta"] * len(deltas), *END, end]
        assert [body["sequence_number"] for _, body in pairs] == list(range(len(pairs)))
        for name, body in pairs:
            assert body["type"] == name
            assert EVENT.validate_python(body).type == name
        (text,) = [part["text"] for part in whole["output"][0]["content"]]
        assert "".join(body["delta"] for body in deltas) == text
        last = pairs[-1][1]["response"]
        assert last["usage"] == whole["usage"]
        assert last["output"][0]["content"] == whole["output"][0]["content"]
        assert last["id"] == pairs[0][1]["response"]["id"]
        assert pairs[0][1]["response"]["usage"] is None
        ids = {body["item_id"] for body in deltas}
        assert ids == {last["output"][0]["id"]}


def test_every_way_of_openais_client_to_stream_works(client):
    ask = {**GREEDY, "input": ASKED, "max_output_tokens": 100}
    whole = client.responses.create(**ask)
    assert whole.status == "completed", "the run learnt to stop"
    parts = [part for part in client.responses.create(**ask, stream=True) if part.type == "response.output_text.delta"]
    assert "".join(part.delta for part in parts) == whole.output_text
    assert len(parts) > 1
    with client.responses.stream(**ask) as stream:
        snapshots = [part.snapshot for part in stream if part.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text
    assert final.usage == whole.usage
    with client.responses.with_streaming_response.create(**ask, store=True) as response:
        assert response.headers["x-nybble-ignored"] == "store"
        assert response.parse().output_text == whole.output_text


def test_log_probabilities_come_where_they_are_included(server, client):
    ask = {**GREEDY, "input": ASKED, "max_output_tokens": 4, "include": ["message.output_text.logprobs"]}
    chat = server.chat("run", ASKED, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
    raw = server.post("/v1/responses", **ask, top_logprobs=2).json()
    Response.model_validate(raw)
    assert raw["output"][0]["content"][0]["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    pairs = sent(server, **ask, top_logprobs=2)
    streamed = [entry for name, body in pairs if name.endswith("text.delta") for entry in body["logprobs"]]
    assert streamed == chat["choices"][0]["logprobs"]["content"]
    assert all(EVENT.validate_python(body) for _, body in pairs)
    more = client.responses.with_raw_response.create(**(ask | {"include": ["reasoning.encrypted_content"]}))
    assert more.headers["x-nybble-ignored"] == "include"


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"n": 2}, "n"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "input"),
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.0.type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "system", "content": "x"}]}, "input.0.role"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"instructions": ["x"]}, "instructions"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
]


@pytest.mark.parametrize(("more", "param"), REFUSED, ids=[f"{param}-{n}" for n, (_, param) in enumerate(REFUSED)])
def test_what_is_not_supported_is_refused_by_name(server, more, param):
    refused = server.post("/v1/responses", **{"model": "run", "input": ASKED, **more})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    print(error["message"])
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_model_that_fails_in_a_stream_ends_it_with_a_failed_response(tuned_run, cache):
    make = lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=64, cache=cache)  # noqa: E731
    with serving(make, Limits(timeout=0.3)) as server:
        (base,) = [name for name, model in server.engine.models.items() if model.parent is None]
        pairs = sent(server, model=base, input="go on", max_output_tokens=400, temperature=0)
        name, body = pairs[-1]
        assert name == "response.failed"
        assert EVENT.validate_python(body).response.error.code == "server_error"
        assert "not done within 0.3 s" in body["response"]["error"]["message"]
        late = server.post("/v1/responses", model=base, input="go on", max_output_tokens=400, temperature=0)
        assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")
        server.wait_for("nybble_running", 0, 5)
