"""The examples of docs/serving.md, run against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from nybble.serve.loading import load_pipeline
from tests.conftest import ROOT
from tests.local_server import events, serving

EXAMPLES = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def server(long_run, cache):
    with serving(lambda metrics: load_pipeline([long_run], metrics, device="cpu", queue=64, cache=cache)) as server:
        yield server


def test_the_examples_answer(server):
    kinds = []
    for kind, text in EXAMPLES:
        here = re.sub(r"http://(127\.0\.0\.1:8000|localhost:11434)", server.url, text).replace("alpaca", "run")
        command = ["bash", "-c", here] if kind == "bash" else [sys.executable, "-c", here]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        kinds.append(kind)
        if kind == "python":
            assert result.stdout
        elif '"stream": true' in text:
            assert events(result.stdout.splitlines())[-1]["choices"][0]["finish_reason"]
        else:
            assert json.loads(result.stdout)["choices"][0]["message"]["role"] == "assistant"
    assert kinds == ["bash", "python", "bash", "python", "python", "python"]


def test_what_a_person_sees_is_what_the_docs_show():
    from nybble.serve.guard import ROUTES

    text = (ROOT / "docs" / "serving.md").read_text()
    assert all(route in text for route in ROUTES)
