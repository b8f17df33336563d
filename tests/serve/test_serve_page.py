"""The page in a real browser: typed at, streamed to, and looked at in two widths, light and dark."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nybble.serve.loading import load_pipeline
from tests.browser import CHROMIUM, browser
from tests.local_server import another_run, serving

SYSTEM = "Say it backwards."
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")


@pytest.fixture(scope="module")
def server(tuned_run, cache):
    strong = another_run(tuned_run, "strong", 3.0)
    summary = json.loads((strong.folder / "summary.json").read_text())
    summary["data"]["system"] = SYSTEM
    (strong.folder / "summary.json").write_text(json.dumps(summary))
    runs = [tuned_run, strong]
    with serving(lambda metrics: load_pipeline(runs, metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


def test_the_page_is_one_file_that_asks_nobody_else(server):
    answer = server.http.get(server.url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://", answer.text)
    assert not re.search(r"""(src|href)=["'](?!data:)""", answer.text)
    assert "innerHTML" not in answer.text  # what a model says is text, never markup


def test_a_chat_by_keyboard_streams_side_by_side(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.window(1280, 800, "light")
        page.open(server.url)
        page.wait_for("document.querySelectorAll('#model option').length === 3")
        assert page.run("document.activeElement.id") == "message"
        page.screenshot(tmp_path / "empty-wide-light.png")
        page.run("document.getElementById('compare').click(); document.getElementById('tune').click()")
        page.run(
            "for (const [id, value] of [['temperature', 0], ['max_tokens', 60]]) document.getElementById(id).value = value"
        )
        page.run("document.getElementById('message').focus()")
        page.type("say <b>one</b>")
        page.key("Enter", "\r", modifiers=8)  # Shift: a new line
        page.type("two 3")
        page.key("Enter", "\r")
        page.wait_for("document.querySelectorAll('.answer').length === 2")
        page.wait_for("document.querySelectorAll('.going').length === 0")
        said = page.run("[...document.querySelectorAll('.answer .said')].map(e => e.textContent)")
        ask = {"max_tokens": 60, "temperature": 0, "top_p": 0.95}
        base = page.run("document.querySelector('.answer h2').textContent").removesuffix(" (base)")
        expected = [server.chat(name, "say <b>one</b>\ntwo 3", **ask)["choices"][0]["message"]["content"]
                    for name in (base, "run")]  # fmt: skip
        assert said == expected
        assert page.run("document.querySelector('.asked').textContent") == "say <b>one</b>\ntwo 3"
        speeds = page.run("[...document.querySelectorAll('.speed')].map(e => e.textContent)")
        assert re.fullmatch(
            r"60 tokens · [\d.]+ tokens/s · first after [\d.]+ s · cut off at the token limit", speeds[0]
        )
        for width, height in ((1280, 800), (400, 800)):
            for scheme in ("light", "dark"):
                page.window(width, height, scheme)
                page.screenshot(tmp_path / f"{width}-{scheme}.png")
                assert page.run("document.documentElement.scrollWidth") <= width
        print(tmp_path)
        assert {re.match(r"https?://[^/]+", url)[0] for url in page.requested if url.startswith("http")} == {server.url}
        assert not page.complaints


def test_the_system_message_of_the_training_rows_is_offered(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.querySelectorAll('#model option').length === 3")
        choose = (
            "(() => {{ $('model').value = '{}'; $('model').dispatchEvent(new Event('change')); "
            "return $('system').value; }})()"
        )
        assert page.run(choose.format("run")) == ""
        assert page.run(choose.format("strong")) == SYSTEM
        assert page.run("$('saidby').textContent") == "System message, as in the training rows"
        assert page.run("history('strong', 'hello')[0].content") == SYSTEM
        assert page.run(choose.format("run")) == "", "another run's"
        page.run("$('system').value = 'mine'")
        assert page.run(choose.format("strong")) == "mine", "what was typed stays"
        assert not page.complaints


def test_top_p_may_be_nothing_on_the_page_as_in_a_request(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.querySelectorAll('#model option').length === 3")
        for value, valid in (("0", True), ("1", True), ("0.95", True), ("-0.01", False), ("1.01", False)):
            assert page.run(f"$('top_p').value = '{value}', $('top_p').checkValidity()") == valid, value


@pytest.mark.slow
def test_escape_stops_an_answer_and_an_error_is_shown(server, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.window(400, 800, "dark")
        page.open(server.url)
        page.wait_for("document.querySelectorAll('#model option').length === 3")
        page.run(
            "document.getElementById('model').selectedIndex = 2; document.getElementById('max_tokens').value = 300"
        )
        page.run("document.getElementById('temperature').value = 0")
        page.type("go on")
        page.key("Enter", "\r")
        page.wait_for("document.querySelector('.said')?.textContent.length > 3")
        page.key("Escape")
        page.wait_for("document.querySelector('.speed').textContent.includes('stopped')")
        server.wait_for("nybble_running", 0, 5)
        page.run("document.getElementById('max_tokens').value = 9999")
        assert page.run("document.getElementById('message').value") == ""
        page.type("again")
        page.key("Enter", "\r")
        page.wait_for(
            "document.querySelector('.answer .failed')?.textContent.includes(' is 512 tokens')"
        )
        assert page.run("document.getElementById('message').value") == "again"  # to be sent once more
        page.screenshot(tmp_path / "error.png")
        page.run("document.getElementById('max_tokens').value = 300")
        page.key("Enter", "\r")
        page.wait_for("[...document.querySelectorAll('.said')].at(-1).textContent.length > 3")
        page.run("document.getElementById('anew').click()")
        page.wait_for("going === null")
        assert page.run("turns.length") == 0  # what was broken off is no part of the new chat
        assert page.run("document.getElementById('message').value") == ""
        server.server.should_exit = True
        server.thread.join(20)
        page.type("is anybody there")
        page.key("Enter", "\r")
        page.wait_for("document.querySelector('.answer .failed')?.textContent === 'The server cannot be reached.'")


@pytest.mark.slow
def test_the_page_asks_for_the_key(tuned_run, cache, tmp_path):
    make = lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=4, cache=cache)  # noqa: E731
    with serving(make, key="s3cret") as server, browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.activeElement?.id === 'key'")
        page.type("s3cret")
        page.run("document.getElementById('key').blur()")
        page.wait_for("document.querySelectorAll('#model option').length === 2")
        assert page.run("document.getElementById('trouble').hidden")


@contextlib.contextmanager
def another_site(folder) -> Iterator[str]:
    """A web page of another origin."""
    (folder / "index.html").write_text("<!doctype html><title>another site</title>", encoding="utf-8")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{site.server_port}"
        finally:
            site.shutdown()
            thread.join()


ASK = """fetch('{url}/v1/chat/completions', {{method: 'POST',
    headers: {{'Content-Type': 'application/json', Authorization: 'Bearer {key}'}},
    body: JSON.stringify({{
        model: 'run', messages: [{{role: 'user', content: 'x'}}], max_tokens: 3, stream: {stream}, user: 'u',
    }}),
}}).then(async answer => [answer.status, answer.headers.get('x-nybble-ignored'), await answer.text()], error => String(error))"""


def test_only_a_page_that_is_allowed_may_ask_in_a_browser(tuned_run, cache, tmp_path):
    make = lambda metrics: load_pipeline([tuned_run], metrics, device="cpu", queue=4, cache=cache)  # noqa: E731
    with (
        another_site(tmp_path) as site, another_site(tmp_path) as stranger,
        serving(make, key="s3cret", origins=(site,)) as server, browser(tmp_path / "profile") as page,
    ):  # fmt: skip
        page.open(f"{site}/")
        page.wait_for("document.title === 'another site'")
        status, ignored, text = page.run(ASK.format(url=server.url, key="s3cret", stream="true"))
        assert (status, ignored) == (200, "user")
        assert text.endswith("data: [DONE]\n\n")
        status, _, text = page.run(ASK.format(url=server.url, key="wrong", stream="false"))
        assert status == 401
        assert json.loads(text)["error"]["code"] == "invalid_api_key"  # which the page can show
        page.open(f"{stranger}/")
        page.wait_for(f"location.origin === '{stranger}' && document.title === 'another site'")
        said = page.run(ASK.format(url=server.url, key="s3cret", stream="false"))
        assert said == "TypeError: Failed to fetch"
