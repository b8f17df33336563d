"""What benchmarks and examples import from nybble exists: most of them need a GPU and minutes, and no other test runs them."""

from __future__ import annotations

import ast
import pathlib
import pkgutil
import re

import pytest

from tests.conftest import ROOT

FILES = sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_it_imports_or_patches_exists(file: pathlib.Path):
    source = file.read_text()
    imported = [
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nybble"
        for name in node.names
    ]
    for name in [*imported, *re.findall(r'mock\.patch\("(nybble[\w.]+)"', source)]:
        pkgutil.resolve_name(name)
