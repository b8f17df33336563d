"""Calls of functions by a server that answers from a real tuned run."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from nybble.serve.loading import load_decoder, load_pipeline
from tests.local_server import events, serving_run

ASK = [{"role": "user", "content": "say one two 3"}]
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "days"],
    "properties": {"city": {"enum": ["Köln", "a \"b\" {c"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module", params=[load_pipeline, load_decoder])
def server(request, long_run, cache):
    with serving_run(request.param, long_run, cache) as server:
        yield server


def check_calls(calls):
    for call in calls:
        assert call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert set(arguments) == {"city", "days"}
            assert 0 <= arguments["days"] <= 99
        else:
            assert (call.function.name, arguments) == ("now", {})


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.6, "seed": 3, "n": 5}])
def test_a_required_call_fits_its_schema(client, options):
    answer = client.chat.completions.create(
        model="run", messages=ASK, max_tokens=300, tools=[WEATHER, NOW], tool_choice="required",
        parallel_tool_calls=False, **options,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(choice.message.tool_calls) == 1
        check_calls(choice.message.tool_calls)


def test_a_named_function_is_called_once(client):
    for name in ("weather", "now"):
        choice = {"type": "function", "function": {"name": name}}
        answer = client.chat.completions.create(
            model="run", messages=ASK, max_tokens=300, tools=[WEATHER, NOW], tool_choice=choice, temperature=1.5, seed=1
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == name
        check_calls([call])


def test_a_stream_adds_up_to_the_whole_answer(server, client):
    ask = {"model": "run", "messages": ASK, "max_tokens": 300, "temperature": 1.4, "seed": 7, "tools": [WEATHER, NOW]}
    ask |= {"tool_choice": "required"}
    whole = client.chat.completions.create(**ask).choices[0]
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert [call.function.name for call in streamed.message.tool_calls] == [
        call.function.name for call in whole.message.tool_calls
    ]
    assert [json.loads(call.function.arguments) for call in streamed.message.tool_calls] == [
        json.loads(call.function.arguments) for call in whole.message.tool_calls
    ]
    chunks = events(server.post(**ask, stream=True).text.splitlines())
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "id" in deltas[0]
    assert len(deltas) > 2, "the arguments come in pieces"


def test_an_answer_may_be_text_where_no_call_is_demanded(server):
    never_ends = {"logit_bias": {"2": -100}}  # </s>
    ask = {"model": "run", "messages": ASK, "max_tokens": 30, "temperature": 0, "tools": [WEATHER], **never_ends}
    (choice,) = server.post(**ask).json()["choices"]
    assert choice["message"]["content"]
    assert "tool_calls" not in choice["message"]
    chunks = events(server.post(**ask, stream=True, logprobs=True).text.splitlines())
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == choice["message"]["content"]
    assert (
        sum(len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks if chunk["choices"][0]["logprobs"]) > 1
    )


def test_a_call_that_the_limit_cuts_says_so(server):
    ask = {"model": "run", "messages": ASK, "tools": [WEATHER], "tool_choice": "required"}
    whole = server.post(**ask, max_tokens=300, temperature=0).json()
    for limit in (3, whole["usage"]["completion_tokens"] - 12):
        (choice,) = server.post(**ask, max_tokens=limit, temperature=0).json()["choices"]
        assert choice["finish_reason"] == "length"
        for call in choice["message"].get("tool_calls", ()):
            assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].startswith(
                call["function"]["arguments"]
            )


def test_what_a_function_returned_is_answered(server, client):
    first = client.chat.completions.create(
        model="run", messages=ASK, max_tokens=300, tools=[WEATHER], tool_choice="required", temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    (call,) = first.choices[0].message.tool_calls
    messages = [*ASK, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}]
    second = client.chat.completions.create(model="run", messages=messages, max_tokens=9, tools=[WEATHER])
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    without = client.chat.completions.create(model="run", messages=messages, max_tokens=9)
    assert first.usage.prompt_tokens != without.usage.prompt_tokens < second.usage.prompt_tokens
    none = client.chat.completions.create(
        model="run", messages=messages, max_tokens=9, tools=[WEATHER], tool_choice="none"
    )
    assert none.usage.prompt_tokens == without.usage.prompt_tokens


def test_messages_that_openais_client_made_are_read_again(client):
    ask = {
        "model": "run",
        "messages": ASK,
        "max_tokens": 300,
        "tools": [openai.pydantic_function_tool(Days)],
        "temperature": 0,
    }
    ask |= {"tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0].message
    parsed = client.chat.completions.parse(**ask).choices[0].message
    tokens = set()
    for message in (streamed, streamed.model_dump(), parsed, parsed.model_dump()):
        calls = (
            message["tool_calls"] if isinstance(message, dict) else [call.model_dump() for call in message.tool_calls]
        )
        history = [*ASK, message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": "17"}]
        answer = client.chat.completions.create(model="run", messages=history, max_tokens=1)
        tokens.add(answer.usage.prompt_tokens)
    assert len(tokens) == 1


def test_a_stop_string_within_a_call_leaves_no_call_to_be_made(server):
    ask = {
        "model": "run",
        "messages": ASK,
        "max_tokens": 300,
        "tools": [WEATHER],
        "tool_choice": "required",
        "temperature": 0,
    }
    (choice,) = server.post(**ask, stop='"days"').json()["choices"]
    assert choice["finish_reason"] == "stop"
    chunks = events(server.post(**ask, stop='"days"', stream=True).text.splitlines())
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"


def test_the_last_step_of_an_agent_may_ask_for_json(server):
    history = [*ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT]
    answer = server.post(model="run", messages=history, max_tokens=200, response_format={"type": "json_object"})
    assert answer.status_code == 200, answer.text


def test_tools_of_any_kind_may_be_sent_where_none_is_to_be_called(server):
    custom = [{"type": "custom", "custom": {"name": "x"}}]
    assert server.post(model="run", messages=ASK, max_tokens=2, tools=custom, tool_choice="none").status_code == 200


class Days(pydantic.BaseModel):
    days: int = pydantic.Field(ge=0, le=9)


def test_openais_client_makes_functions_of_models(client):
    class Weather(pydantic.BaseModel):
        days: int = pydantic.Field(ge=0, le=9)

    tools = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(
        model="run", messages=ASK, tools=tools, tool_choice="required", max_tokens=300, temperature=1, seed=2
    )
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in answer.choices[0].message.tool_calls)


RESULT = {"role": "tool", "tool_call_id": "a", "content": "x"}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("more", "param", "why"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tools names no function"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "it has weather"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "must be none, auto, required"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "must be none, auto, required"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name", "the same name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.custom", "there is no field"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "letters, digits"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools.0.function.parameters", 'type: "object"'),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}]},
         "tools", "Unimplemented"),
        ({"tools": [NOW] * 129}, "tools", "at most 128"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools", "response_format"),
        ({"tools": [WEATHER], "messages": [*ASK, {"role": "assistant", "content": "It"}]}, "messages.1.role", "continued"),
        ({"functions": [{"name": "f"}]}, "functions", "name functions in tools"),
        ({"messages": [*ASK, {"role": "assistant"}]}, "messages.1.content", "is missing"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}]}, "messages.1", "must follow"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}, *ASK]}, "messages.2.role", "must come first"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT, RESULT]},
         "messages.3.tool_call_id", "no open call"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0.tool_calls", "only a message from"),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id", "the id of the call"),
        ({"messages": [*ASK, {"role": "tool", "content": "x", "tool_call_id": "b"}]}, "messages.1.tool_call_id", "no open call"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}]},
         "messages.1.tool_calls.0.function.arguments", "JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_with_its_field(server, more, param, why):
    answer = server.post(**{"model": "run", "messages": ASK, "max_tokens": 3, **more})
    print(answer.json()["error"]["message"])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert why in answer.json()["error"]["message"]


def test_without_the_package_the_command_that_installs_it_is_told(server, monkeypatch):
    monkeypatch.setattr("nybble.serve.encoding.INSTALLED", False)
    answer = server.post(model="run", messages=ASK, tools=[NOW])
    assert (answer.status_code, answer.json()["error"]["param"]) == (501, "tools")
    assert "structured" in answer.json()["error"]["message"]
