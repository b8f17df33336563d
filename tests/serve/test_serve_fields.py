"""What clients send beside the question: each field is honoured, ignored and said so, or refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import threading

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from nybble.data.rows.formats import Message
from nybble.data.text.template import Template
from nybble.data.text.tokens import encode
from nybble.generate.batching import ActiveRequest
from nybble.generate.request import Request
from nybble.generate.sampling import BatchSampler
from nybble.serve.chat_request import ChatRequest
from nybble.serve.completion_request import CompletionRequest
from nybble.serve.fields import RequestError
from nybble.serve.loading import load_pipeline
from nybble.serve.protocol import parse
from nybble.serve.responses import ResponseRequest
from tests.data.test_template import NEEDS_A_USER
from tests.local_server import events, serving

CHAT, PLAIN, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASK = [{"role": "user", "content": "say one two 3"}]
QUEUE = 64


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=QUEUE, cache=cache)) as server:
        yield server


def said(answer):
    return [choice["message"]["content"] for choice in answer.json()["choices"]]


def check_refused(response, param, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    print(f"{status} {error['param']}: {error['message']}")
    assert error["param"] == param
    return error["message"]


UNUSED = {
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "x",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
    "prediction": {"type": "content", "content": "one"}, "reasoning_effort": "low", "verbosity": "high",
}  # fmt: skip


def test_fields_that_change_nothing_are_named_in_a_header_and_in_the_log(client, caplog):
    logging.getLogger("nybble.serve").propagate = True
    ask = {"model": "run", "messages": ASK, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.with_raw_response.create(**ask)
    assert "x-nybble-ignored" not in plain.headers
    with caplog.at_level("INFO"):
        answer = client.chat.completions.with_raw_response.create(**ask, **UNUSED)
    assert set(answer.headers["x-nybble-ignored"].split(", ")) == UNUSED.keys()
    assert f"; ignored {answer.headers['x-nybble-ignored']}" in caplog.text
    assert answer.parse().choices == plain.parse().choices
    named = [{**ASK[0], "name": "me"}, {"role": "assistant", "content": "one", "annotations": [{"type": "x"}]}, *ASK]
    options = {"include_usage": True, "include_obfuscation": True}
    with client.chat.completions.with_streaming_response.create(
        **(ask | {"messages": named}), stream=True, stream_options=options, store=True
    ) as stream:
        expected = ["messages[].name", "messages[].annotations", "stream_options.include_obfuscation", "store"]
        assert sorted(stream.headers["x-nybble-ignored"].split(", ")) == sorted(expected)
        assert events(stream.iter_lines())[-1]["usage"]["completion_tokens"]
    quiet = {"store": False, "parallel_tool_calls": False, "modalities": ["text"], "logit_bias": {}}
    assert "x-nybble-ignored" not in client.chat.completions.with_raw_response.create(**ask, **quiet).headers


def fault(kind, body):
    try:
        parse(kind, json.dumps(body).encode())
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("kind", "least", "theirs"),
    [
        (ChatRequest, {"messages": ASK}, chat_create_params.CompletionCreateParamsStreaming),
        (CompletionRequest, {"prompt": "x"}, completion_create_params.CompletionCreateParamsStreaming),
        (ResponseRequest, {"input": "x"}, response_create_params.ResponseCreateParamsStreaming),
    ],
)
def test_every_field_that_openais_client_knows_is_known_here(kind, least, theirs):
    for name in theirs.__annotations__:
        for value in ("odd", 0.5, True, [{"odd": 1}], {"odd": 1}):
            error = fault(kind, {"model": "run", **least, name: value})
            assert error is None or (error.param or "").split(".")[0] == name, (name, value, error.message)
            assert error is None or error.message != f"there is no field {name}"


def test_tools_may_be_sent_where_none_is_to_be_called(server, client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ask = {"model": "run", "messages": ASK, "max_tokens": 4, "temperature": 0}
    bare = said(server.post(**ask))
    with_none = server.post(**ask, tools=tools, tool_choice="none")
    assert with_none.headers["x-nybble-ignored"] == "tools"
    assert said(with_none) == said(server.post(**ask, tool_choice="none")) == bare
    assert said(server.post(**ask, tools=[], tool_choice="auto")) == bare
    assert said(server.post(**ask, functions=[{"name": "f"}], function_call="none")) == bare
    check_refused(server.post(**ask, functions=[{"name": "f"}]), "functions")
    for route, prompt in (("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"})):
        for more in ({}, {"tool_choice": "auto"}):
            refused = server.post(route, model="run", **prompt, tools=tools, **more)
            assert "send tool_choice: none" in check_refused(refused, "tools")
        check_refused(server.post(route, model="run", **prompt, tool_choice="required"), "tool_choice")
    with pytest.raises(openai.BadRequestError, match="only /v1/chat/completions calls functions"):
        client.completions.create(model="run", prompt="x", extra_body={"tools": tools})


@pytest.mark.parametrize(
    ("field", "value"),
    [("modalities", ["text", "audio"]), ("audio", {"voice": "x"}),
     ("web_search_options", {}), ("moderation", {"model": "x"})],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(server, field, value):
    check_refused(server.post(model="run", messages=ASK, **{field: value}), field)


def ids_of(answer):
    """Which tokens an answer has, by their bytes."""
    return [tuple(token["bytes"]) for token in answer.json()["choices"][0]["logprobs"]["content"]]


def test_biases_forbid_and_force_tokens(server):
    ask = {"model": "run", "messages": ASK, "max_tokens": 6, "temperature": 0}
    (free,) = said(server.post(**ask))
    tokenizer = server.engine.models["run"].template.tokenizer
    first = tokenizer(free, add_special_tokens=False)["input_ids"][0]
    (without,) = said(server.post(**ask, logit_bias={str(first): -100}))
    assert not without.startswith(tokenizer.decode([first]).strip())
    (forced,) = said(server.post(**ask, logit_bias={"50": 100}))
    assert forced == tokenizer.decode([50] * 6).strip()
    plain = server.post(PLAIN, model="run", prompt="say", max_tokens=3, temperature=0, logit_bias={"50": 100, "51": 0})
    assert plain.json()["choices"][0]["text"].strip() == tokenizer.decode([50] * 3).strip()
    rows = server.engine.models["run"].rows
    message = check_refused(server.post(**ask, logit_bias={"5": 1, str(rows): 1}), "logit_bias")
    assert message == f"logit_bias names token {rows}, but the ids of run go from 0 to {rows - 1:,}"


def test_penalties_keep_tokens_from_coming_again(server):
    ask = {"model": "run", "messages": ASK, "max_tokens": 12, "temperature": 0, "logprobs": True}
    loop = {**ask, "logit_bias": {"50": 1}}
    free = ids_of(server.post(**loop))
    assert len(set(free)) < len(free), "without a penalty something repeats itself"
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}):
        assert ids_of(server.post(**loop, **penalty)) != free, penalty
    once = ids_of(server.post(**ask, repetition_penalty=100))
    assert len(set(once)) == len(once)
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1, "min_p": 0, "logit_bias": {}}
    assert ids_of(server.post(**ask, **neutral)) == ids_of(server.post(**ask))


def test_min_p_1_leaves_the_likeliest_token_only(server):
    ask = {"model": "run", "messages": ASK, "max_tokens": 20}
    assert said(server.post(**ask, temperature=2, seed=4, min_p=1)) == said(server.post(**ask, temperature=0))


@pytest.mark.parametrize(
    ("field", "values"),
    [("frequency_penalty", (-2.1, 2.1, "1", True)), ("presence_penalty", (-3, 3, [1])), ("min_p", (-0.1, 1.1)),
     ("repetition_penalty", (0, -1, 101)),
     ("logit_bias", ([1], "x", {"a": 1}, {"-1": 1}, {"05": 1}, {" 5": 1}, {"٥": 1}, {"1" * 30: 1}, {"5": 101}, {"5": -100.5},
                     {"5": "1"}, {"5": None}, {"5": True}, {str(n): 1 for n in range(1025)}))],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(server, field, values):
    for value in values:
        check_refused(server.post(model="run", messages=ASK, **{field: value}), field)
        check_refused(server.post(PLAIN, model="run", prompt="x", **{field: value}), field)


@given(st.dictionaries(st.integers(0, 400), st.floats(-100, 100) | st.integers(-100, 100), max_size=8))
def test_biases_are_read_as_they_were_meant(biases):
    body = {"model": "m", "prompt": "x", "logit_bias": {str(token): bias for token, bias in biases.items()}}
    asked = parse(CompletionRequest, json.dumps(body).encode())
    assert dict(asked.logit_bias) == {token: bias for token, bias in biases.items() if bias}
    assert asked.logit_changes["logit_bias"] == asked.logit_bias


def test_top_p_0_leaves_the_likeliest_token_only(server):
    ask = {"model": "run", "messages": ASK, "max_tokens": 20}
    greedy = said(server.post(**ask, temperature=0))
    assert said(server.post(**ask, top_p=0, seed=5, temperature=2)) == greedy
    assert said(server.post(**ask, top_p=0, n=3, top_k=10**30)) == greedy * 3
    assert server.post(**ask, seed=5, temperature=2, top_k=10**30).status_code == 200
    check_refused(server.post(**ask, top_p=-0.1), "top_p")


def test_more_than_four_stop_strings_are_watched_for(server, tiny_llama):
    ask = {"model": tiny_llama.name, "messages": ASK, "max_tokens": 60, "temperature": 0}
    (free,) = said(server.post(**ask))
    (cut,) = said(server.post(**ask, stop=[*(f"never {n}" for n in range(63)), free[6:11]]))
    assert cut == free[: free.index(free[6:11])].strip()
    assert "up to 64 strings" in check_refused(server.post(**ask, stop=["x"] * 65), "stop")
    check_refused(server.post(**ask, stop="x" * 1001), "stop")


def test_as_many_prompts_as_may_wait_are_answered_and_more_are_refused_for_good(server, client):
    ask = {"model": "run", "max_tokens": 2, "temperature": 0}
    answer = client.completions.create(**ask, prompt=["one two", "red"] * (QUEUE // 2))
    assert [choice.index for choice in answer.choices] == list(range(QUEUE))
    assert len({choice.text for choice in answer.choices}) <= 2
    message = check_refused(server.post(PLAIN, **ask, prompt=["one"] * (QUEUE + 1)), "prompt")
    assert message == (
        "this request asks for 65 answers, but at most 64 can wait in the queue; ask for fewer at once, or start the server with "
        "a larger --queue"
    )
    check_refused(server.post(PLAIN, **ask, prompt=["one"] * 33, n=2), "prompt")
    check_refused(server.post(PLAIN, **ask, prompt="one", n=QUEUE + 1), "n")
    check_refused(server.post(CHAT, **ask, messages=ASK, n=QUEUE + 1), "n")
    check_refused(server.post(CHAT, **ask, messages=ASK, n=129), "n")


def test_an_assistants_last_message_is_continued_as_it_was_trained(peaky_run, cache, monkeypatch):
    with serving(lambda metrics: load_pipeline([peaky_run], metrics, device="cpu", queue=16, cache=cache)) as server:
        seen, submit = [], server.engine.worker.submit
        monkeypatch.setattr(
            server.engine.worker, "submit", lambda asked, sinks: seen.extend(asked) or submit(asked, sinks)
        )
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ask = {"model": "peaky-run", "max_tokens": 30, "temperature": 0}
        asked = [{"role": "user", "content": "say five ten nine 3"}]
        whole = client.chat.completions.create(**ask, messages=asked).choices[0].message.content
        ids, words = seen[0].prompt, whole.split(" ")
        assert len(words) > 2, "the answer has a middle to continue from"
        for text in (words[0], f"{words[0]} ", f" {words[0]}", " ".join(words[:2])):
            seen.clear()
            begun = [*asked, {"role": "assistant", "content": text}]
            rest = client.chat.completions.create(**ask, messages=begun).choices[0].message.content
            assert text.lstrip() + rest == whole
            turns = (Message("user", asked[0]["content"]), Message("assistant", text))
            (trained,) = encode(server.engine.models["peaky-run"].template, [turns])
            assert seen[0].prompt == trained.ids[:-1], "all but the token that ends the answer"
            parts = client.chat.completions.create(**ask, messages=begun, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == rest
            response = client.responses.create(model="peaky-run", temperature=0, input=begun)
            assert response.output_text == rest
        seen.clear()
        empty = client.chat.completions.create(**ask, messages=[*asked, {"role": "assistant", "content": " "}])
        assert (empty.choices[0].message.content, seen[0].prompt) == (whole, ids)


def test_vllms_flags_for_a_last_message_are_taken_where_they_agree(server):
    ask = {"model": "run", "max_tokens": 2}
    begun = [*ASK, {"role": "assistant", "content": "one"}]
    yes, no = {"continue_final_message": True}, {"continue_final_message": False}
    assert server.post(**ask, messages=begun, **yes, add_generation_prompt=False).status_code == 200
    assert server.post(**ask, messages=ASK, **no, add_generation_prompt=True).status_code == 200
    assert "so this can only be true" in check_refused(
        server.post(**ask, messages=begun, **no), "continue_final_message"
    )
    check_refused(server.post(**ask, messages=ASK, **yes), "continue_final_message")
    check_refused(server.post(**ask, messages=begun, add_generation_prompt=True), "add_generation_prompt")
    for last in ("assistant", "system"):
        check_refused(server.post(**ask, messages=[*begun, {"role": last, "content": "x"}]), "messages.2.role")
    message = check_refused(server.post(**ask, messages=begun[1:]), "messages.0.role")
    assert "the one before it must be from the user" in message


def test_a_greeting_is_taken_or_refused_as_the_template_has_it(server, monkeypatch):
    greeted = [{"role": "assistant", "content": "hello"}, *ASK]
    assert server.post(model="run", messages=greeted, max_tokens=2).status_code == 200
    model = server.engine.models["run"]
    strict = Template(model.template.tokenizer, "mine.jinja", NEEDS_A_USER)
    monkeypatch.setitem(server.engine.models, "run", dataclasses.replace(model, template=strict))
    message = check_refused(server.post(model="run", messages=greeted), "messages.0")
    assert message.endswith("fails on turns of assistant, user, assistant: roles must alternate, the user first")
    check_refused(server.post(RESPONSES, model="run", input=greeted), "input.0")
    system = [{"role": "system", "content": "x"}, *greeted]
    assert server.post(model="run", messages=system, max_tokens=2).status_code == 200  # this one minds the first only
    assert server.post(model="run", messages=ASK, max_tokens=2).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["none", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KNOWN = sorted(
    {*ChatRequest.model_fields, *ChatRequest.ignored, *ChatRequest.refused, *CompletionRequest.model_fields,
     *ResponseRequest.model_fields, *ResponseRequest.ignored, *ResponseRequest.refused} - {"model"}
)  # fmt: skip
GOOD = {
    "top_p": 0, "temperature": 2, "top_k": 10**30, "stop": list("vwxyz"), "n": 2, "seed": -1, "max_tokens": 1, "stream": True,
    "stream_options": {"include_obfuscation": True, "include_usage": True}, "tool_choice": "none",
    "tools": [{"type": "function"}],
    "messages": [*ASK, {"role": "assistant", "content": "one"}], "prompt": ["one", [5, 6]], "store": True, "metadata": {"a": "b"},
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "instructions": "be brief",
    "max_output_tokens": 1, "top_logprobs": 2, "min_p": 0.5, "repetition_penalty": 1.2, "presence_penalty": -2,
    "frequency_penalty": 1.5, "response_format": {"type": "text"}, "logit_bias": {"5": -100, "6": 1.5},
    "include": ["message.output_text.logprobs"], "text": {"verbosity": "low"},
    "truncation": "auto", "logprobs": 1, "best_of": 2, "echo": False, "parallel_tool_calls": True,
}  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from([(CHAT, "messages"), (PLAIN, "prompt"), (RESPONSES, "input")]),
    good=st.sets(st.sampled_from(sorted(GOOD)), max_size=5),
    odd=st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=8), JSON, max_size=2),
)
def test_whatever_is_asked_for_is_answered_or_refused_by_name(server, route, good, odd):
    path, source = route
    short = {"max_output_tokens": 2} if path == RESPONSES else {"max_tokens": 2}
    body = {"model": "run", source: GOOD[source], **short, **{name: GOOD[name] for name in sorted(good)}, **odd}
    response = server.http.post(
        server.url + path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, timeout=30
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["param"] is not None or error["code"] == "invalid_json", error


def test_a_queue_that_is_full_for_now_says_when_to_come_back(tuned_run, cache, monkeypatch):
    with serving(lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=4, cache=cache)) as server:
        go, generate = threading.Event(), server.engine.worker.generator._compute
        monkeypatch.setattr(server.engine.worker.generator, "_compute", lambda batch: (go.wait(30), generate(batch)))
        ask = {"model": "run", "messages": ASK, "max_tokens": 2}
        answers = []
        threads = [threading.Thread(target=lambda n=n: answers.append(server.post(**ask, n=n))) for n in (1, 4)]
        for thread, (name, value) in zip(threads, (("nybble_running", 1), ("nybble_waiting", 4)), strict=True):
            thread.start()
            server.wait_for(name, value)
        refused = server.post(**ask)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "queue_full"
        check_refused(server.post(**ask, n=5), "n")  # not 429: it would never fit
        go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert list(itertools.chain(*map(said, answers)))


@given(st.floats(0, 2), st.sampled_from([0, 3, 2**31, 10**30]), st.floats(0, 1, exclude_min=True))
def test_whatever_sampling_is_asked_for_a_likely_token_is_drawn(temperature, top_k, top_p):
    asked = parse(CompletionRequest, json.dumps({
        "model": "m", "prompt": "x", "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }).encode())  # fmt: skip
    logits = torch.tensor([[0.0, 30.0, 31.0, -1e4]])
    if asked.temperature == 0:  # generate's argmax
        assert temperature < 1e-4
    else:
        sampling = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
        row = ActiveRequest(Request([1], 8, None, frozenset(), **sampling), None, 0)
        assert int(BatchSampler([row], logits.device)(None, logits).argmax()) in (1, 2)
