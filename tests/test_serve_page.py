"""The page in a real browser: typed at, streamed to, and looked at in two widths, light and dark."""

from __future__ import annotations

import json
import re

import pytest

from browser import CHROMIUM, browser
from local_server import another_run, serving
from nybble.serve.pipeline import load_pipeline

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
            r"60 tokens · [\d.]+ tokens/s · first after [\d.]+ s · cut off at the longest answer", speeds[0]
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
        page.wait_for("document.querySelector('.answer .failed')?.textContent.includes('knows 512 positions')")
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
