"""What generate/ may know, and that serve/ leaves the making of tokens to it."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

import nybble

SOURCE = pathlib.Path(nybble.__file__).parent


def names(file):
    """Modules that are imported, and attributes that are called."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield f".{node.func.attr}()"


DECODES = re.compile(r"\.(batch_)?decode\b")


@pytest.mark.parametrize("file", sorted((SOURCE / "generate").glob("*.py")), ids=lambda file: file.name)
def test_generation_knows_no_text_no_event_loop_and_no_metrics(file):
    forbidden = ("asyncio", "prometheus_client", "fastapi", "nybble.data", "nybble.chat", "nybble.model", "nybble.run")
    found = [name for name in names(file) if name.startswith(forbidden) or "Tokenizer" in name or DECODES.search(name)]
    assert not found


@pytest.mark.parametrize("file", sorted((SOURCE / "serve").glob("*.py")), ids=lambda file: file.name)
def test_the_server_generates_nothing_itself(file):
    found = [name for name in names(file) if name in (".generate()", ".forward()", ".init_continuous_batching()")]
    assert not found
    assert file.name == "loading.py" or not any(name.startswith(("torch", "peft")) for name in names(file))
