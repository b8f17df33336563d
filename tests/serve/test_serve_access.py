"""Who is let in: web pages by --allow-origin, host names by --allow-host; and what OpenAI's other routes say."""

from __future__ import annotations

import openai
import pytest
import typer
from typer.main import get_command

from nybble.cli import using
from nybble.cli.app import app
from nybble.errors import ServeError
from nybble.serve import server as serve_server
from nybble.serve.app import Limits
from nybble.serve.guard import make_access_rules
from nybble.serve.loading import load_pipeline
from nybble.serve.server import Address
from nybble.serve.vllm import serve_with_vllm
from tests.local_server import serving

PAGE = "https://app.example"
CHAT = "/v1/chat/completions"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    "Access-Control-Request-Private-Network": "true",
}


def make(tuned_run, cache):
    return lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=16, cache=cache)


def ask(server, origin, **headers):
    body = {"model": "run", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "store": True}
    return server.http.post(server.url + CHAT, json=body, headers={"Origin": origin, **headers})


def test_a_page_that_is_allowed_may_ask_and_no_other(tuned_run, cache):
    with serving(make(tuned_run, cache), key="s3cret", origins=(PAGE, "http://localhost:3000")) as server:
        for origin in (PAGE, "http://localhost:3000"):
            before = server.http.options(server.url + CHAT, headers={"Origin": origin, **PREFLIGHT})
            assert before.status_code == 200  # without the key: a browser asks first whether it may send it
            assert before.headers["access-control-allow-origin"] == origin
            assert "authorization" in before.headers["access-control-allow-headers"]
            assert "POST" in before.headers["access-control-allow-methods"]
            assert before.headers["access-control-allow-private-network"] == "true"
            answer = ask(server, origin, Authorization="Bearer s3cret")
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert "x-nybble-ignored" in answer.headers["access-control-expose-headers"]
        refused = ask(server, PAGE)
        assert refused.status_code == 401  # and the page can read why
        assert refused.headers["access-control-allow-origin"] == PAGE
        for other in ("https://evil.example", "https://app.example.evil.example", "http://app.example", "null"):
            before = server.http.options(server.url + CHAT, headers={"Origin": other, **PREFLIGHT})
            assert before.status_code == 400
            assert "access-control-allow-origin" not in before.headers
            assert "access-control-allow-origin" not in ask(server, other, Authorization="Bearer s3cret").headers


def test_without_the_option_no_page_may_ask(tuned_run, cache):
    with serving(make(tuned_run, cache)) as server:
        before = server.http.options(server.url + CHAT, headers={"Origin": PAGE, **PREFLIGHT})
        assert before.status_code == 405
        for answer in (before, ask(server, PAGE)):
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_host_that_is_allowed_is_answered_without_a_key(tuned_run, cache):
    with serving(make(tuned_run, cache), hosts=("gpu.example",)) as server:
        for host, status in (("gpu.example", 200), ("GPU.example:8000", 200), ("localhost:1", 200), ("[::1]:80", 200),
                             ("gpu.example.evil.example", 403), ("evil.example", 403), ("", 403)):  # fmt: skip
            answer = server.http.get(f"{server.url}/v1/models", headers={"Host": host})
            assert answer.status_code == status, host
        error = server.http.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).json()["error"]
        assert error["message"] == (
            "this server answers to localhost, 127.0.0.1, gpu.example, not to 'evil.example'; start it with --allow-host NAME, "
            "or with an API key"
        )


def test_what_cannot_be_allowed_is_said():
    assert make_access_rules(None, ["http://LocalHost:3000/"], ["GPU.example"]).origins == ("http://localhost:3000",)
    assert make_access_rules(None, [], ["GPU.example"]).hosts == ("gpu.example",)
    assert make_access_rules("k", ["*"], []).origins == ("*",)
    assert make_access_rules(None, ["vscode-webview://1abc"], []).origins
    with pytest.raises(ServeError, match=r"--allow-origin '\*' without an API key[\s\S]*--api-key-file"):
        make_access_rules(None, ["*"], [])
    for wrong in ("app.example", "https://app.example/page", "https://*.example", "https://", "null", ""):
        with pytest.raises(
            ServeError, match=r"is not the origin of a web page[\s\S]*--allow-origin https://app.example"
        ):
            make_access_rules("k", [wrong], [])
    for wrong in ("http://gpu.example", "gpu.example:8000", "gpu.example/", "*", "", ".example"):
        with pytest.raises(ServeError, match=r"is not a host name[\s\S]*--allow-host gpu.example"):
            make_access_rules(None, [], [wrong])


def test_the_command_line_brings_both_to_the_server(tuned_run, monkeypatch):
    started = []
    monkeypatch.setattr(serve_server, "serve", lambda runs, place, *rest, **more: started.append(place))
    using.serve(typer.Context(get_command(app)), [tuned_run.folder], allow_origin=[PAGE], allow_host=["gpu.example"])
    assert (started[0].access.origins, started[0].access.hosts) == ((PAGE,), ("gpu.example",))
    monkeypatch.undo()
    with pytest.raises(ServeError, match=r"--allow-origin and --allow-host are for nybble's own server"):
        serve_with_vllm(
            [tuned_run], Address(access=make_access_rules(None, [PAGE], [])), device="auto", limits=Limits()
        )


def test_the_terminal_shows_what_is_wrong_before_anything_loads(tuned_run, here):
    for words, message in (
        (["--allow-origin", "*"], "lets any web page"),
        (["--allow-host", "a:1"], "no scheme, no port"),
    ):
        said = here("serve", tuned_run.folder, *words)
        assert said.returncode != 0
        assert message in " ".join(said.stderr.split()), said.stderr
        assert "loading" not in said.stderr + said.stdout


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    with serving(make(tuned_run, cache)) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "route", "why"),
    [("POST", "/v1/embeddings", "they make no embeddings"), ("POST", "/v1/images/generations", "they make no images"),
     ("POST", "/v1/audio/speech", "they have no audio"), ("POST", "/v1/moderations", "do not moderate"),
     ("GET", "/v1/responses/resp_1", "not stored"), ("DELETE", "/v1/chat/completions/x", "not stored"),
     ("GET", "/v1/files", "files are not stored"), ("POST", "/v1/fine_tuning/jobs", "nybble train"),
     ("POST", "/api/chat", "its OpenAI address")],
)  # fmt: skip
def test_a_route_of_openais_that_is_not_here_says_why(server, method, route, why):
    answer = server.http.request(method, server.url + route)
    error = answer.json()["error"]
    print(error["message"])
    assert answer.status_code == 404
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "unsupported", None)
    assert error["message"].startswith(f"there is no route {method} {route}: ")
    assert why in error["message"]


def test_openais_client_raises_with_the_reason(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    with pytest.raises(openai.NotFoundError, match="the models here generate text; they make no embeddings"):
        client.embeddings.create(model="run", input="one")
    with pytest.raises(openai.NotFoundError, match="responses are not stored"):
        client.responses.retrieve("resp_1")
