"""Requests that are wrong: by their fields, their JSON, their HTTP."""

from __future__ import annotations

import gzip
import http.client
import json
import pickle
import socket
from dataclasses import dataclass
from typing import Any

CHAT, PLAIN, RESPONSES, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"
ASK = [{"role": "user", "content": "say one"}]
DROP = object()  # in place of a field's value: the field is left out
HOST = b"localhost"


@dataclass(frozen=True)
class Hostile:
    """One request, as its bytes go out."""

    name: str
    sent: bytes
    status: int
    param: str | None = None
    """The field that the error names; None: none is held against it."""
    says: str = ""
    """What the message holds."""
    ends: bool = False
    """Whether the server must end the connection."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    body: bytes
    rest: bytes
    """What came after it, until the server ended the connection or was silent."""
    ended: bool


def chat(**changes: Any) -> dict[str, Any]:
    return _body({"model": "run", "messages": ASK, "max_tokens": 2}, changes)


def plain(**changes: Any) -> dict[str, Any]:
    return _body({"model": "run", "prompt": "one", "max_tokens": 2}, changes)


def response(**changes: Any) -> dict[str, Any]:
    return _body({"model": "run", "input": "say one", "max_output_tokens": 2}, changes)


def _body(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (fields | changes).items() if value is not DROP}


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """One of `tools`."""
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def said(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def named(name: str, schema: Any, **more: Any) -> dict[str, Any]:
    """The value of response_format that asks for a schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **more}}


def nested(depth: int) -> dict[str, Any]:
    """The schema of a list in a list in a list."""
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def head(
    method: str = "POST", path: str = CHAT, version: str = "HTTP/1.1", host: bytes | None = HOST, **headers: str
) -> bytes:
    """A request's lines, without the blank one that ends them."""
    lines = [f"{method} {path} {version}".encode()]
    lines += [] if host is None else [b"Host: " + host]
    lines += [f"{name.replace('_', '-')}: {value}".encode("latin-1") for name, value in headers.items()]
    return b"\r\n".join(lines) + b"\r\n"


def post(path: str, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    """A POST that is well-formed around its body."""
    more = {"Content_Type": kind} if kind else {}
    return head("POST", path, **more, Content_Length=str(len(body)), **headers) + b"\r\n" + body


def ask(address: tuple[str, int], sent: bytes, seconds: float = 20) -> Reply:
    """Send bytes and read the answer."""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection, method=sent.split(b" ", 1)[0].decode("latin-1"))
        answer.begin()
        body = answer.read()
        connection.settimeout(0.02)
        rest, ended = b"", False
        try:
            while not ended:
                more = connection.recv(65536)
                rest, ended = rest + more, not more
        except TimeoutError:
            pass
        return Reply(answer.status, body, rest, ended)


WRONG_FIELDS: list[tuple[str, dict[str, Any], int, str | None]] = [
    # route, body, status, field that is named
    (CHAT, chat(model=5), 400, "model"),
    (CHAT, chat(model=None), 400, "model"),
    (CHAT, chat(model=DROP), 400, "model"),
    (CHAT, chat(model=["run"]), 400, "model"),
    (CHAT, chat(model=""), 404, "model"),
    (CHAT, chat(model="gpt-4"), 404, "model"),
    (CHAT, chat(model="RUN"), 404, "model"),
    (CHAT, chat(model="run\0"), 404, "model"),
    (CHAT, chat(model="../run"), 404, "model"),
    (CHAT, chat(model="/etc/passwd"), 404, "model"),
    (CHAT, chat(model="run" * 10_000), 404, "model"),
    (CHAT, chat(messages=DROP), 400, "messages"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages={}), 400, "messages"),
    (CHAT, chat(messages="say one"), 400, "messages"),
    (CHAT, chat(messages=["say one"]), 400, "messages.0"),
    (CHAT, chat(messages=[None]), 400, "messages.0"),
    (CHAT, chat(messages=[ASK]), 400, "messages.0"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
    (CHAT, chat(messages=[{"content": "say one"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "User", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": ["user"], "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), 400, "messages.0.tool_call_id"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.tool_call_id"),
    (CHAT, chat(messages=[{"role": "function", "name": "f", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[*ASK, {"role": "system", "content": "x"}]), 400, "messages.1.role"),
    (CHAT, chat(messages=[*ASK, {"role": "developer", "content": "x"}]), 400, "messages.1.role"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[*ASK, *[{"role": "assistant", "content": "x"}] * 2]), 400, "messages.2.role"),
    (CHAT, chat(messages=said(7)), 400, "messages.0.content"),
    (CHAT, chat(messages=said(None)), 400, "messages.0.content"),
    (CHAT, chat(messages=said({"text": "x"})), 400, "messages.0.content"),
    (CHAT, chat(messages=said(["x"])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": "text"}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": "text", "text": 1}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": ["text"], "text": "x"}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": "input_audio", "input_audio": {"data": ""}}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said([{"type": "file", "file": {"file_id": "x"}}])), 400, "messages.0.content"),
    (CHAT, chat(messages=said("x", tool_calls=[{"id": "1"}])), 400, "messages.0.tool_calls.0.function"),
    (CHAT, chat(messages=said("x", function_call={"name": "f"})), 400, "messages.0.function_call"),
    (CHAT, chat(messages=said("x", audio={"id": "1"})), 400, "messages.0.audio"),
    (CHAT, chat(messages=said("x", contents="y")), 400, "messages.0.contents"),
    (CHAT, chat(messages=ASK * 513), 400, "messages"),
    (CHAT, chat(messages=ASK * 50_000), 400, "messages"),
    (CHAT, chat(messages=[5] * 500_000), 400, "messages"),
    (CHAT, chat(messages=said("one two " * 2000)), 400, "messages"),
    (CHAT, chat(messages=said("one two " * 500)), 400, "messages"),
    (CHAT, chat(messages=said("\U0001f600" * 3000)), 400, "messages"),
    (CHAT, chat(messages=[{"role": "system", "content": "one two " * 2000}, *ASK]), 400, "messages"),
    (CHAT, chat(messages=said([{"type": "text", "text": "one two "}] * 2000)), 400, "messages"),
    (CHAT, chat(messages=said("one two " * 9) * 100), 400, "messages"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=-5), 400, "max_tokens"),
    (CHAT, chat(max_tokens="7"), 400, "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens"),
    (CHAT, chat(max_tokens=True), 400, "max_tokens"),
    (CHAT, chat(max_tokens=[]), 400, "max_tokens"),
    (CHAT, chat(max_tokens=2**31), 400, "messages"),
    (CHAT, chat(max_tokens=2**64), 400, "messages"),
    (CHAT, chat(max_tokens=10**30), 400, "messages"),
    (CHAT, chat(max_tokens=10**4000), 400, "messages"),
    (CHAT, chat(max_tokens=100_000), 400, "messages"),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens"),
    (CHAT, chat(max_completion_tokens={}), 400, "max_completion_tokens"),
    (CHAT, chat(temperature=-0.1), 400, "temperature"),
    (CHAT, chat(temperature=2.1), 400, "temperature"),
    (CHAT, chat(temperature="0.5"), 400, "temperature"),
    (CHAT, chat(temperature=[1]), 400, "temperature"),
    (CHAT, chat(temperature=10**400), 400, "temperature"),
    (CHAT, chat(top_p=-0.1), 400, "top_p"),
    (CHAT, chat(top_p=1.0001), 400, "top_p"),
    (CHAT, chat(top_p=[0.5]), 400, "top_p"),
    (CHAT, chat(top_k=-2), 400, "top_k"),
    (CHAT, chat(top_k=1.5), 400, "top_k"),
    (CHAT, chat(top_k="5"), 400, "top_k"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=-1), 400, "n"),
    (CHAT, chat(n=129), 400, "n"),
    (CHAT, chat(n=65), 400, "n"),
    (CHAT, chat(n=10**9), 400, "n"),
    (CHAT, chat(n=True), 400, "n"),
    (CHAT, chat(n="2"), 400, "n"),
    (CHAT, chat(seed=2**63), 400, "seed"),
    (CHAT, chat(seed=-(2**63) - 1), 400, "seed"),
    (CHAT, chat(seed=0.5), 400, "seed"),
    (CHAT, chat(seed="x"), 400, "seed"),
    (CHAT, chat(stop=5), 400, "stop"),
    (CHAT, chat(stop=""), 400, "stop"),
    (CHAT, chat(stop=["a", ""]), 400, "stop"),
    (CHAT, chat(stop=["a", 1]), 400, "stop"),
    (CHAT, chat(stop={"a": 1}), 400, "stop"),
    (CHAT, chat(stop=["a"] * 65), 400, "stop"),
    (CHAT, chat(stop="a" * 1001), 400, "stop"),
    (CHAT, chat(stream="yes"), 400, "stream"),
    (CHAT, chat(stream=1), 400, "stream"),
    (CHAT, chat(stream=[]), 400, "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(stream=True, stream_options=[]), 400, "stream_options"),
    (CHAT, chat(stream=True, stream_options={"include_usage": "yes"}), 400, "stream_options.include_usage"),
    (CHAT, chat(stream=True, stream_options={"usage": True}), 400, "stream_options.usage"),
    (CHAT, chat(logprobs=5), 400, "logprobs"),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs"),
    (CHAT, chat(logit_bias={"5": -101}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"400": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"9" * 5000: 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={str(n): 1 for n in range(100_000)}), 400, "logit_bias"),
    (CHAT, chat(logit_bias=[1]), 400, "logit_bias"),
    (CHAT, chat(frequency_penalty=2.5), 400, "frequency_penalty"),
    (CHAT, chat(presence_penalty="x"), 400, "presence_penalty"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
    (CHAT, chat(repetition_penalty=10**400), 400, "repetition_penalty"),
    (CHAT, chat(min_p=-0.1), 400, "min_p"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools.0.function"),
    (CHAT, chat(tools={}), 400, "tools"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
    (CHAT, chat(tool_choice={"type": "function"}), 400, "tool_choice"),
    (CHAT, chat(functions=[{}]), 400, "functions"),
    (CHAT, chat(parallel_tool_calls="x"), 400, "parallel_tool_calls"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type"),
    (CHAT, chat(response_format={"type": "json_object", "schema": {}}), 400, "response_format.schema"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema"),
    (CHAT, chat(response_format=named("a b", {})), 400, "response_format.json_schema.name"),
    (CHAT, chat(response_format=named("a", 5)), 400, "response_format.json_schema.schema"),
    (CHAT, chat(response_format=named("a", {}, strict="x")), 400, "response_format.json_schema.strict"),
    (CHAT, chat(response_format=named("a", {}, more=1)), 400, "response_format.json_schema.more"),
    (CHAT, chat(response_format=named("a", {"type": "strng"})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", False)), 400, "response_format"),
    (CHAT, chat(response_format=named("a", {"not": {}})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", {"$ref": "http://localhost/x"})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", {"$ref": "file:///etc/passwd"})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", {"pattern": "(", "type": "string"})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", {"properties": {f"p{n}": {} for n in range(9000)}})), 400, "response_format"),
    (CHAT, chat(response_format=named("a", nested(150))), 400, "response_format"),
    (CHAT, chat(response_format={"type": "json_object"}, messages=[*ASK, {"role": "assistant", "content": "{"}]), 400,
     "response_format"),
    (PLAIN, plain(response_format={"type": "json_object"}), 400, "response_format"),
    (CHAT, chat(response_format="json"), 400, "response_format"),
    (CHAT, chat(modalities=["audio"]), 400, "modalities"),
    (CHAT, chat(web_search_options={}), 400, "web_search_options"),
    (CHAT, chat(continue_final_message=True), 400, "continue_final_message"),
    (CHAT, chat(add_generation_prompt=False), 400, "add_generation_prompt"),
    (CHAT, chat(documents=[{"text": "x"}]), 400, "documents"),
    (CHAT, chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    (CHAT, chat(temprature=0.5), 400, "temprature"),
    (CHAT, chat(prompt="x"), 400, "prompt"),
    (CHAT, chat(__class__="x"), 400, "__class__"),
    (CHAT, chat(**{"": 1}), 400, ""),
    (CHAT, chat(**{"a.b": 1}), 400, "a.b"),
    (CHAT, chat(**{"x" * 1_000_000: 1}), 400, None),
    (CHAT, chat(**{f"field{n}": n for n in range(150_000)}), 400, "field0"),
    (PLAIN, plain(prompt=None), 400, "prompt"),
    (PLAIN, plain(prompt=DROP), 400, "prompt"),
    (PLAIN, plain(prompt=[]), 400, "prompt"),
    (PLAIN, plain(prompt=[[]]), 400, "prompt"),
    (PLAIN, plain(prompt={}), 400, "prompt"),
    (PLAIN, plain(prompt=5), 400, "prompt"),
    (PLAIN, plain(prompt=[1, "a"]), 400, "prompt"),
    (PLAIN, plain(prompt=[True]), 400, "prompt"),
    (PLAIN, plain(prompt=[1.5]), 400, "prompt"),
    (PLAIN, plain(prompt=[["a"]]), 400, "prompt"),
    (PLAIN, plain(prompt=[[[1]]]), 400, "prompt"),
    (PLAIN, plain(prompt=[10**9]), 400, "prompt"),
    (PLAIN, plain(prompt=[10**30]), 400, "prompt"),
    (PLAIN, plain(prompt=[-1]), 400, "prompt"),
    (PLAIN, plain(prompt=[400]), 400, "prompt"),
    (PLAIN, plain(prompt=[1] * 511), 400, "prompt"),
    (PLAIN, plain(prompt=[1] * 1_000_000), 400, "prompt"),
    (PLAIN, plain(prompt="one two " * 2000), 400, "prompt"),
    (PLAIN, plain(prompt=["one", "one two " * 2000]), 400, "prompt"),
    (PLAIN, plain(prompt=["one"] * 65), 400, "prompt"),
    (PLAIN, plain(prompt=["one"] * 33, n=2), 400, "prompt"),
    (PLAIN, plain(logprobs=6), 400, "logprobs"),
    (PLAIN, plain(logprobs=True), 400, "logprobs"),
    (PLAIN, plain(best_of=3), 400, "best_of"),
    (PLAIN, plain(echo=1), 400, "echo"),
    (PLAIN, plain(max_tokens=0), 400, "max_tokens"),
    (PLAIN, plain(max_tokens=-1, echo=True), 400, "max_tokens"),
    (PLAIN, plain(prompt=[1] * 513, max_tokens=0, echo=True), 400, "prompt"),
    (CHAT, chat(echo=True), 400, "echo"),
    (CHAT, chat(tools=[function("a\nb")]), 400, "tools.0.function.name"),
    (CHAT, chat(tools=[function("f", {"type": "object", "$ref": "http://localhost/x"})]), 400, "tools"),
    (CHAT, chat(tools=[function("f", {"type": "object", "properties": {"x" * 70_000: {}}})]), 400, None),
    (CHAT, chat(tools=[function("f")] * 2), 400, "tools.1.function.name"),
    (PLAIN, plain(suffix="x"), 400, "suffix"),
    (PLAIN, plain(messages=ASK), 400, "messages"),
    (RESPONSES, response(input=DROP), 400, "input"),
    (RESPONSES, response(input=5), 400, "input"),
    (RESPONSES, response(input={}), 400, "input"),
    (RESPONSES, response(input=[]), 400, "input"),
    (RESPONSES, response(input=[5]), 400, "input.0"),
    (RESPONSES, response(input=[{"type": "function_call_output", "call_id": "1", "output": "x"}]), 400, "input.0.type"),
    (RESPONSES, response(input=[{"type": "item_reference", "id": "x"}]), 400, "input.0.type"),
    (RESPONSES, response(input=said("one two " * 2000)), 400, "input"),
    (RESPONSES, response(instructions="one two " * 2000), 400, "input"),
    (RESPONSES, response(instructions=5), 400, "instructions"),
    (RESPONSES, response(max_output_tokens=0), 400, "max_output_tokens"),
    (RESPONSES, response(max_tokens=5), 400, "max_tokens"),
    (RESPONSES, response(metadata={"a": 1}), 400, "metadata.a"),
    (RESPONSES, response(metadata={"x" * 1_000_000: 1}), 400, None),
    (RESPONSES, response(metadata={str(n): n for n in range(100_000)}), 400, "metadata.0"),
    (RESPONSES, response(text={"format": {"type": "json_schema"}}), 400, "text.format.name"),
    (RESPONSES, response(text={"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}), 400, "text.format"),
    (RESPONSES, response(include="x"), 400, "include"),
    (RESPONSES, response(include=[5]), 400, "include.0"),
    (RESPONSES, response(previous_response_id="resp_1"), 400, "previous_response_id"),
    (RESPONSES, response(conversation="c"), 400, "conversation"),
    (RESPONSES, response(background=True), 400, "background"),
    (RESPONSES, response(tools=[{"type": "web_search"}]), 400, "tools"),
    (RESPONSES, response(top_logprobs=2), 400, "top_logprobs"),
]  # fmt: skip
GOOD = json.dumps(chat()).encode()
WRONG_JSON: list[tuple[str, bytes, str]] = [
    # name, body, what the message holds
    ("nothing", b"", "not valid JSON"),
    ("brace", b"{", "not valid JSON"),
    ("cut-off", GOOD[:-5], "not valid JSON"),
    ("rest", GOOD + b" x", "not valid JSON"),
    ("twice", GOOD * 2, "not valid JSON"),
    ("list", b"[1, 2]", ""),
    ("null", b"null", ""),
    ("true", b"true", ""),
    ("number", b"5", ""),
    ("string", b'"run"', ""),
    ("bytes", b"\xff\xfe\x00", "not valid JSON"),
    ("zeros", bytes(1000), "not valid JSON"),
    ("spaces", b" " * 1_000_000, "not valid JSON"),
    ("bom", b"\xef\xbb\xbf" + GOOD, "not valid JSON"),
    ("utf-16", GOOD.decode().encode("utf-16"), "not valid JSON"),
    ("utf-32", GOOD.decode().encode("utf-32-le"), "not valid JSON"),
    ("latin-1", b'{"model": "run", "messages": [{"role": "user", "content": "\xe9"}]}', "not valid JSON"),
    ("overlong-utf-8", b'{"model": "\xc0\xaf"}', "not valid JSON"),
    ("high-surrogate", b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}', "not valid JSON"),
    ("low-surrogate", b'{"model": "run", "messages": [{"role": "user", "content": "\\udc00x"}]}', "not valid JSON"),
    ("raw-surrogate", b'{"model": "\xed\xa0\x80"}', "not valid JSON"),
    ("raw-newline", b'{"model": "ru\nn"}', "not valid JSON"),
    ("raw-nul", b'{"model": "ru\x00n"}', "not valid JSON"),
    ("single-quotes", b"{'model': 'run'}", "not valid JSON"),
    ("comment", b"/* hello */" + GOOD, "not valid JSON"),
    ("trailing-comma", b'{"model": "run",}', "not valid JSON"),
    ("number-as-key", b'{5: "run"}', "not valid JSON"),
    ("nan", b'{"model": "run", "temperature": NaN, "messages": []}', ""),
    ("infinity", GOOD[:-1] + b', "temperature": Infinity}', "temperature"),
    ("minus-infinity", GOOD[:-1] + b', "temperature": -Infinity}', "temperature"),
    ("1e400", GOOD[:-1] + b', "temperature": 1e400}', "temperature"),
    ("leading-zero", GOOD[:-1] + b', "seed": 01}', "not valid JSON"),
    ("plus", GOOD[:-1] + b', "seed": +1}', "not valid JSON"),
    ("hex", GOOD[:-1] + b', "seed": 0x10}', "not valid JSON"),
    ("4300-digits", GOOD[:-1] + b', "seed": ' + b"9" * 4300 + b"}", "seed"),
    ("4301-digits", GOOD[:-1] + b', "seed": ' + b"9" * 4301 + b"}", ""),
    ("lists", b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}", "opening brackets"),
    ("objects", b'{"messages": [' + b"{}," * 1_000_000 + b"{}]}", "opening brackets"),
    ("lists-in-lists", b'{"messages": [' + (b"[" * 90 + b"]" * 90 + b",") * 20_000 + b"[]]}", "opening brackets"),
    ("a-million-digits", GOOD[:-1] + b', "max_tokens": ' + b"9" * 1_000_000 + b"}", ""),
    ("a-million-decimals", GOOD[:-1] + b', "top_p": 1.' + b"1" * 1_000_000 + b"}", "top_p"),
    ("huge-exponent", GOOD[:-1] + b', "top_p": 1e' + b"9" * 100_000 + b"}", ""),
    ("deep-lists", b"[" * 100_000, "not valid JSON"),
    ("deep-lists-closed", b'{"model": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not valid JSON"),
    ("deep-objects", b'{"a":' * 100_000, "not valid JSON"),
    ("deep-in-a-field", GOOD[:-1] + b', "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "not valid JSON"),
    ("gzip", gzip.compress(GOOD), "not valid JSON"),
    ("pickle", pickle.dumps({"model": "run"}), "not valid JSON"),
    ("yaml", b"model: run\nmessages: []\n", "not valid JSON"),
    ("form", b"model=run&messages=x", "not valid JSON"),
]  # fmt: skip


def _fields() -> list[Hostile]:
    cases = []
    for number, (route, body, status, param) in enumerate(WRONG_FIELDS):
        odd = "-".join(
            str(name)[:20] for name in body if body.get(name) not in (chat() | plain() | response()).values()
        )
        name = f"{number:03d}-{route.rsplit('/', 1)[-1]}-{odd or 'without'}"
        cases.append(Hostile(name[:60], post(route, json.dumps(body).encode()), status, param))
        if "stream" not in body and "stream_options" not in body and number % 7 == 0:
            streamed = json.dumps(body | {"stream": True}).encode()
            cases.append(Hostile(f"{name[:50]}-streamed", post(route, streamed), status, param))
    return cases


def _json() -> list[Hostile]:
    return [Hostile(f"json-{name}", post(CHAT, body), 400, None, says) for name, body, says in WRONG_JSON]


def _types() -> list[Hostile]:
    bomb = gzip.compress(bytes(10_000_000))
    return [
        Hostile(f"type-{kind or 'none'}", post(CHAT, GOOD, kind), 415, None, "Content-Type")
        for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json",
                     "application/jsonx", "application/json, text/plain", "application/json; charset=utf-16",
                     "application/json; charset=latin-1", "x" * 5000)
    ] + [
        Hostile("packed-gzip", post(CHAT, gzip.compress(GOOD), Content_Encoding="gzip"), 415, None, "Content-Encoding"),
        Hostile("packed-gzip-bomb", post(CHAT, bomb, Content_Encoding="gzip"), 415, None, "Content-Encoding"),
        Hostile("packed-br", post(CHAT, GOOD, Content_Encoding="br"), 415, None, "Content-Encoding is br"),
        Hostile("5-MB", post(CHAT, b'"' + b"x" * 5_000_000 + b'"'), 413, None, "4,194,304", ends=True),
        Hostile("5-MB-in-chunks", _chunked(b'"' + b"x" * 5_000_000 + b'"', 65536), 413, None, "4,194,304", ends=True),
        Hostile("tiny chunks", _chunked(GOOD + b" " * 100_000, 1), 400, None, "too many small chunks", ends=True),
        Hostile("65-MB-announced", head(Content_Type="application/json", Content_Length="65000000000") + b"\r\n", 413, ends=True),
        Hostile("5-MB-after-asking", head(Content_Type="application/json", Content_Length="5000000", Expect="100-continue")
                + b"\r\n", 413, ends=True),
    ]  # fmt: skip


def _chunked(body: bytes, size: int, trailer: bytes = b"", **headers: str) -> bytes:
    chunks = b"".join(
        f"{len(body[n : n + size]):x}\r\n".encode() + body[n : n + size] + b"\r\n" for n in range(0, len(body), size)
    )
    lines = head(Content_Type="application/json", Transfer_Encoding="chunked", **headers)
    return lines + b"\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


def _routes() -> list[Hostile]:
    asked = [
        ("GET", CHAT, 405), ("PUT", CHAT, 405), ("DELETE", MODELS, 405), ("HEAD", CHAT, 405), ("OPTIONS", CHAT, 405),
        ("TRACE", "/", 405), ("PATCH", "/health", 405), ("PROPFIND", "/", 405), ("get", "/health", 405),
        ("FOO", "/health", 405), ("POST", MODELS, 405), ("GET", "/docs", 404), ("GET", "/openapi.json", 404),
        ("GET", "/v1/models/../../etc/passwd", 404), ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/gpt-4", 404), ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/%ff%fe", 404), ("GET", "/%", 404),
        ("GET", "//", 404), ("GET", "//evil.example/", 404), ("GET", "/v1/" + "x" * 5000, 404),
        ("GET", "/v1/" + "x" * 9000, 414), ("GET", "/?" + "x" * 9000, 414), ("POST", "/v1/embeddings", 404),
        ("POST", CHAT + "/", 404), ("POST", "/v1//chat/completions", 404), ("GET", "/.env", 404),
        ("GET", "/page/index.html", 404),
        ("GET", "*", 400), ("OPTIONS", "*", 400), ("CONNECT", "localhost:22", 400), ("GET", "http://localhost/health", 400),
        ("GET", "http://evil.example/health", 400), ("GET", "https://localhost/health", 400), ("GET", "health", 400),
    ]  # fmt: skip
    return [
        Hostile(f"route-{number:02d}-{method}", head(method, path) + b"\r\n", status, ends=status in (400, 414))
        for number, (method, path, status) in enumerate(asked)
    ]


def _hosts() -> list[Hostile]:
    refused = [
        b"localhost@evil.example", b"evil.example@localhost", b"localhost:1@evil.example", b"localhost:80:80", b"localhost:-1",
        b"localhost:65536", b"localhost:8000x", b"localhost:", b"[::1", b"[localhost]", b"::1", b"local host", b"localhost/",
        b"localhost/x", b"http://localhost", b"localhost,evil.example", b"localhost\xff", b"localhost#", b"%6cocalhost",
    ]  # fmt: skip
    strangers = [
        b"", b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"10.0.0.1:8000", b"0.0.0.0", b"127.1",
        b"2130706433", b"[::]", b"[2001:db8::1]:80", b"localhost.",
    ]  # fmt: skip
    get = b"GET /v1/models HTTP/1.1\r\n"
    return [
        *(Hostile(f"host-{n:02d}", head("GET", MODELS, host=host) + b"\r\n", 400, says="Host", ends=True)
          for n, host in enumerate(refused)),
        *(Hostile(f"stranger-{n:02d}", head("GET", MODELS, host=host) + b"\r\n", 403, says="answers to localhost")
          for n, host in enumerate(strangers)),
        Hostile("host-missing", get + b"\r\n", 400, says="Host", ends=True),
        Hostile("host-twice", get + b"Host: localhost\r\nHost: localhost\r\n\r\n", 400, says="Host", ends=True),
        Hostile("host-folded", get + b"Host: localhost\r\n evil.example\r\n\r\n", 400, says="Host", ends=True),
        Hostile("host-missing-1.0", b"GET /v1/models HTTP/1.0\r\n\r\n", 403, ends=True),
    ]  # fmt: skip


def _framing() -> list[Hostile]:
    start, size = head(Content_Type="application/json"), str(len(GOOD)).encode()
    chunks = f"{len(GOOD):x}\r\n".encode() + GOOD + b"\r\n0\r\n\r\n"
    second = head("GET", "/health") + b"\r\n"

    def case(name: str, sent: bytes, status: int = 400, says: str = "", ends: bool = True) -> Hostile:
        return Hostile(f"http-{name}", sent, status, None, says, ends)

    return [
        case("cl-and-te", start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks, says="ambiguous"),
        case("te-and-cl", start + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunks, says="ambiguous"),
        case("cl-and-te-smuggles", start + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + second),
        case("te-in-1.0", start.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, says="ambiguous"),
        case("two-lengths", start + b"Content-Length: 5\r\nContent-Length: " + size + b"\r\n\r\n" + GOOD, says="Content-Length"),
        case("a-list-of-lengths", start + b"Content-Length: 5, 6\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-negative", start + b"Content-Length: -5\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-plus", start + b"Content-Length: +5\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-hex", start + b"Content-Length: 0x10\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-empty", start + b"Content-Length:\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-word", start + b"Content-Length: many\r\n\r\n" + GOOD, says="Content-Length"),
        case("length-of-30-digits", start + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", says="Content-Length"),
        case("te-gzip", start + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks, says="Transfer-Encoding"),
        case("te-twice", start + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks, says="Transfer"),
        case("te-identity", start + b"Transfer-Encoding: identity\r\n\r\n" + chunks, says="Transfer-Encoding"),
        case("te-xchunked", start + b"Transfer-Encoding: xchunked\r\n\r\n" + chunks, says="Transfer-Encoding"),
        case("chunk-size-word", start + b"Transfer-Encoding: chunked\r\n\r\nfive\r\n", says="chunk"),
        case("chunk-size-negative", start + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nxxxxx\r\n0\r\n\r\n", says="chunk"),
        case("chunk-size-huge", start + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 21 + b"\r\n", says="chunk"),
        case("chunk-too-long", start + b"Transfer-Encoding: chunked\r\n\r\n2\r\nxxxxx\r\n0\r\n\r\n", says="chunk"),
        case("chunk-size-endless", start + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * 300_000, 431),
        case("trailer-bad", start + b"Transfer-Encoding: chunked\r\n\r\n0\r\nbad line\r\n\r\n", says="header"),
        case("trailers-endless", start + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"x" * 300_000, 431),
        case("space-before-colon", start + b"Content-Length : 5\r\n\r\n", says="header"),
        case("space-before-name", b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n", says="header"),
        case("no-colon", start + b"hello\r\n\r\n", says="header"),
        case("empty-name", start + b": x\r\n\r\n", says="header"),
        case("nul-in-a-header", start + b"X: a\x00b\r\n\r\n", says="header"),
        case("cr-in-a-header", start + b"X: a\rb\r\n\r\n", says="header"),
        case("non-ascii-name", start + b"X-\xc3\xa9: a\r\n\r\n", says="header"),
        case("101-headers", start + b"".join(b"X-%d: a\r\n" % n for n in range(101)) + b"\r\n", 431, "100 lines"),
        case("20-kB-header", start + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431, "16,384"),
        case("20-kB-cookie", start + b"Cookie: a=" + b"b" * 20_000 + b"\r\n\r\n", 431, "16,384"),
        case("300-kB-header", start + b"X: " + b"a" * 300_000 + b"\r\n\r\n", 431),
        case("endless-headers", start + b"X: a\r\n" * 50_000, 431),
        case("endless-request-line", b"GET /" + b"a" * 300_000, 431),
        case("http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", says="HTTP/2.0 is not supported"),
        case("http-9.9", b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", says="HTTP/9.9 is not supported"),
        case("http-0.9", b"GET /health\r\n\r\n", says="not HTTP/1.1"),
        case("lower-case-http", b"GET /health http/1.1\r\nHost: localhost\r\n\r\n", says="not HTTP/1.1"),
        case("two-spaces", b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", says="not HTTP/1.1"),
        case("tab", b"GET\t/health HTTP/1.1\r\nHost: localhost\r\n\r\n", says="not HTTP/1.1"),
        case("no-request-line", b"\r\n\r\n", says="not HTTP/1.1"),
        case("method-of-signs", b"G(ET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", says="not HTTP/1.1"),
        case("raw-utf-8-path", b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n", says="not HTTP/1.1"),
        case("tls", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)) + b"\r\n\r\n", says="not HTTP/1.1"),
        case("ssh", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", says="not HTTP/1.1"),
        case("smtp", b"EHLO evil.example\r\nMAIL FROM:<a@b>\r\n\r\n", says="not HTTP/1.1"),
        case("redis", b"*1\r\n$4\r\nPING\r\n\r\n", says="not HTTP/1.1"),
        case("garbage-after-get", head("GET", "/nothing", Connection="close") + b"\r\n" + b"\x00garbage" * 100, 404),
        case("a-body-with-get", head("GET", CHAT, Content_Length="5") + b"\r\nhello", 405, ends=False),
        case("websocket", head("GET", CHAT, Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13",
                               Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==") + b"\r\n", 405, ends=False),
        case("h2c", head("GET", CHAT, Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="AAMAAABk") + b"\r\n",
             405, ends=False),
        case("expectation-unknown", head("GET", "/nothing", Expect="the-unexpected") + b"\r\n", 404, ends=False),
        case("path-with-raw-cr", b"GET /a\rb HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        case("range-and-cookies", head("GET", "/nothing", Range="bytes=0-1,2-3", Cookie="a=" + "b" * 4000) + b"\r\n", 404,
             ends=False),
        case("origin-of-another-page", head("OPTIONS", CHAT, Origin="https://evil.example",
                                            Access_Control_Request_Method="POST") + b"\r\n", 405, ends=False),
    ]  # fmt: skip


CASES = [*_fields(), *_json(), *_types(), *_routes(), *_hosts(), *_framing()]
ODD_AND_RIGHT = [
    # name, request: each is answered with 200
    ("nul-in-text", post(CHAT, json.dumps(chat(messages=said("a\0b"))).encode())),
    ("key-twice", post(CHAT, GOOD[:-1] + b', "max_tokens": 1}')),
    ("emoji", post(CHAT, json.dumps(chat(messages=said("\U0001f600\u202e\u200b"))).encode())),
    ("pair-of-surrogates", post(CHAT, GOOD.replace(b"say one", b"\\ud83d\\ude00"))),
    ("private-use", post(CHAT, json.dumps(chat(messages=said("\ue0f00c\ue0f1"))).encode())),
    ("empty-text", post(CHAT, json.dumps(chat(messages=said(""))).encode())),
    ("control-tokens-as-text", post(CHAT, json.dumps(chat(messages=said("</s><s><unk>"))).encode())),
    ("charset", post(CHAT, GOOD, 'Application/JSON ; charset="UTF-8"')),
    ("chunks-of-1", _chunked(GOOD, 1)),
    ("trailers", _chunked(GOOD, 7, b"X-Sum: 5\r\n", Trailer="X-Sum")),
    ("same-length-twice", head(Content_Type="application/json") + b"Content-Length: %d\r\n" % len(GOOD) * 2 + b"\r\n" + GOOD),
    ("http-1.0", post(CHAT, GOOD).replace(b"HTTP/1.1", b"HTTP/1.0")),
    ("after-asking", post(CHAT, GOOD, Expect="100-continue")),
    ("seed-at-the-edge", post(CHAT, json.dumps(chat(seed=-(2**63), temperature=0, top_p=0)).encode())),
    ("line-feeds-alone", post(CHAT, GOOD).replace(b"\r\n", b"\n")),
    ("hop-headers", post(CHAT, GOOD, X_Forwarded_For="1.2.3.4, \xe9", Forwarded="for=_x", Via="1.1 a", Cookie="a=b")),
]  # fmt: skip
