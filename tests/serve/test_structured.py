"""Answers that follow a JSON schema."""

from __future__ import annotations

import json
import time

import numpy
import pydantic
import pytest
import torch

from nybble.chat.loading import load_answerers
from nybble.generate.constraint import mask_words
from nybble.generate.request import GenerationError, Request, complete
from nybble.serve import grammar
from nybble.serve.grammar import GrammarState, json_grammar, make_constrain
from nybble.serve.loading import load_decoder, load_pipeline
from tests.local_server import events, serving_run

ASK = [{"role": "user", "content": "say one two 3"}]
RESPONSES = "/v1/responses"
SCHEMAS = {
    "person": {
        "type": "object", "additionalProperties": False, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    },
    "choice": {"enum": ["red", "blue", 7]},
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "code": {"type": "string", "pattern": "^[a-c]{2}-[0-9]{2}$"},
    "either": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"é": {"const": "ü"}}, "required": ["é"],
                                            "additionalProperties": False}]},
}  # fmt: skip


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=99)


def fits(name, value):
    return {
        "person": lambda: set(value) == {"name", "age"} and len(value["name"]) <= 5 and 0 <= value["age"] <= 99,
        "choice": lambda: value in ("red", "blue", 7),
        "list": lambda: 2 <= len(value) <= 3 and all(isinstance(each, bool) for each in value),
        "code": lambda: len(value) == 5 and value[2] == "-" and set(value[:2]) <= set("abc"),
        "either": lambda: value is None or value == {"é": "ü"},
    }[name]()


def asked(schema, name="it"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


@pytest.fixture(scope="module", params=[load_pipeline, load_decoder])
def server(request, tuned_run, cache):
    with serving_run(request.param, tuned_run, cache) as server:
        yield server


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_fit_their_schema(client, name):
    for options in (
        {"temperature": 0},
        {"temperature": 1.7, "seed": 5, "n": 4},
        {"temperature": 1, "seed": 9, "top_p": 0.8},
    ):
        answer = client.chat.completions.create(
            model="run", messages=ASK, max_tokens=200, response_format=asked(SCHEMAS[name]), **options
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert fits(name, json.loads(choice.message.content)), choice.message.content


def test_openais_client_parses_what_it_asked_for(client):
    ask = {"model": "run", "max_tokens": 200, "messages": ASK, "temperature": 1.5, "seed": 3}
    person = client.chat.completions.parse(**ask, response_format=Person).choices[0].message.parsed
    assert isinstance(person, Person)
    response = client.responses.parse(
        model="run", input="who?", text_format=Person, max_output_tokens=200, temperature=0
    )
    assert isinstance(response.output_parsed, Person)
    assert response.text.format.name == "Person"
    with client.responses.stream(model="run", input="who?", text_format=Person, temperature=0) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_a_json_object_is_any_object_and_a_limit_cuts_it(server):
    ask = {"model": "run", "messages": ASK, "response_format": {"type": "json_object"}}
    for seed in range(4):
        (choice,) = server.post(**ask, max_tokens=300, temperature=1, seed=seed).json()["choices"]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
        else:  # a random model may write a string without an end
            assert (choice["finish_reason"], text[0]) == ("length", "{")
    long = asked({"type": "array", "items": {"type": "boolean"}, "minItems": 50})
    (choice,) = server.post(**ask | {"response_format": long}, max_tokens=9).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"][0]) == ("length", "[")


def test_a_stream_is_constrained_beside_answers_that_are_not(server):
    ask = {"model": "run", "messages": ASK, "temperature": 0, "max_tokens": 100}
    free = server.post(**ask).json()["choices"][0]["message"]["content"]
    chunks = events(server.post(**ask, response_format=asked(SCHEMAS["code"]), stream=True).text.splitlines())
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert fits("code", json.loads(text))
    assert server.post(**ask, response_format={"type": "text"}).json()["choices"][0]["message"]["content"] == free


def test_log_probabilities_stay_the_models_own_and_biases_do_not_break_a_schema(server):
    ask = {"model": "run", "messages": ASK, "temperature": 0, "max_tokens": 100, "logprobs": True, "top_logprobs": 3}
    free, bound = (
        server.post(**ask, **more).json()["choices"][0]["logprobs"]["content"][0]
        for more in ({}, {"response_format": asked(SCHEMAS["code"])})
    )
    assert free["top_logprobs"] == bound["top_logprobs"]
    assert bound["logprob"] < bound["top_logprobs"][0]["logprob"]
    biased = {**ask, "logit_bias": {"50": 100}, "frequency_penalty": 2, "response_format": asked(SCHEMAS["code"])}
    (choice,) = server.post(**biased).json()["choices"]
    assert fits("code", json.loads(choice["message"]["content"]))


def test_a_schema_that_cannot_be_followed_says_why(server):
    for schema, why in (
        ({"type": "strng"}, "Invalid type: strng"), ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}, "max is 2000"),
            ({"enum": ["x" * 70_000]}, "has 70,014 characters, more than 65,536"),
    ):  # fmt: skip
        answer = server.post(model="run", messages=ASK, response_format=asked(schema))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"
        assert why in answer.json()["error"]["message"]
        text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
        answer = server.post(RESPONSES, model="run", input="x", text=text)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text.format")


def test_without_the_package_the_command_that_installs_it_is_told(server, monkeypatch):
    monkeypatch.setattr("nybble.serve.encoding.INSTALLED", False)
    answer = server.post(model="run", messages=ASK, response_format={"type": "json_object"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (501, "false")
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "not_installed")
    assert "install" in error["message"]
    assert "structured" in error["message"]
    monkeypatch.setattr(grammar, "INSTALLED", False)
    assert make_constrain({}, 5) is None


def test_the_tokens_that_end_an_answer_may_come_exactly_where_the_grammar_may_end(tuned_run, cache):
    (answerer,) = load_answerers([tuned_run], cache, "cpu", dequantise=True)
    tokenizer, size = answerer.tokenizer, answerer.model.config.vocab_size
    quote, comma, *letters = (tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in '",[""]')
    stops = frozenset({2, comma})
    state = make_constrain({None: tokenizer}, size)(
        Request([1], 9, None, stops, grammar=json_grammar({"type": "array", "items": {"const": ""}}))
    )

    def allowed():
        mask = numpy.zeros(mask_words(size), dtype=numpy.uint32)
        state.fill(mask)
        return {n for n in range(size) if int(mask[n // 32]) >> n % 32 & 1}

    assert not allowed() & stops
    for token in letters:
        assert token in allowed()
        state.take(token)
    assert allowed() == stops
    state.take(quote)
    assert "cannot be followed" in state.error
    assert len(allowed()) == size
    with pytest.raises(GenerationError, match="cannot be followed"):
        make_constrain({None: tokenizer}, size)(Request([1], 9, None, stops, grammar="nonsense"))


def test_an_answer_whose_grammar_fails_under_way_fails_alone(server, monkeypatch):
    take = GrammarState.take

    def failing(state, token_id):
        take(state, token_id)
        state.error = "the grammar cannot be followed: too complex"

    monkeypatch.setattr(GrammarState, "take", failing)
    generator = server.engine.worker.generator
    answer = server.post(model="run", messages=ASK, response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "too complex" in answer.json()["error"]["message"]
    assert generator.healthy()
    assert server.post(model="run", messages=ASK, max_tokens=3).status_code == 200


@pytest.mark.slow
def test_smollm2_answers_in_json(smollm2, tmp_path, cache, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.padded import Padded

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    began = time.perf_counter()
    constrain = make_constrain({None: tokenizer}, model.config.vocab_size)
    print(f"tokenizer {time.perf_counter() - began:.2f} s")
    text = "Tell me about a person called Ada who is 36 years old, as JSON."
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    ids = chat["input_ids"] if not isinstance(chat, list) else chat
    stops = frozenset({tokenizer.eos_token_id})
    requests = [
        Request(ids, 120, None, stops, temperature=0.7, seed=n, grammar=json_grammar(schema))
        for n, schema in enumerate([*SCHEMAS.values(), {"type": "object"}])
    ]
    for generator in (Padded(model, 0, constrain=constrain), make_decoder(model, constrain=constrain)):
        for name, answer in zip([*SCHEMAS, "object"], complete(generator, requests), strict=True):
            said = tokenizer.decode(answer.ids, skip_special_tokens=True)
            print(name, answer.finish, said)
            assert name == "object" or answer.finish == "stop"
            assert name == "object" or fits(name, json.loads(said))
