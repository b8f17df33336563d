"""The workflow of docs/evaluation.md: its YAML, its nybble commands, and what its script does with each exit status."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import textwrap

import pytest
import typer.main
import yaml

from nybble.cli.app import app
from nybble.evaluate.gate import parse_requirements
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def workflow():
    section = (
        (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("## A gate")[2].partition("\n## ")[0]
    )
    (block,) = re.findall(r"(?:^(?:    .*)?\n)+", section[section.index("    name: gate") :], re.M)[:1]
    return yaml.safe_load(textwrap.dedent(block))


@pytest.fixture(scope="module")
def scripts(workflow):
    return [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]


def commands(scripts):
    """The arguments of each nybble command."""
    for script in scripts:
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("||")[0])
            if words[:1] == ["nybble"]:
                yield words[1:]


def test_it_is_a_workflow(workflow):
    assert workflow.keys() == {"name", True, "permissions", "jobs"}, "YAML reads the key `on` as true"
    job = workflow["jobs"]["gate"]
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert job["env"] == {"RUN": "${{ inputs.run }}"}, "an input within a script would be run as part of it"
    assert set(workflow[True]["workflow_dispatch"]["inputs"]) == {"run"}


def test_its_commands_parse(scripts, tmp_path):
    found = list(commands(scripts))
    assert [words[0] for words in found] == ["eval", "export"]
    for name, *words in found:
        given = [str(tmp_path) if word == "$RUN" else word for word in words]
        command = typer.main.get_command(app).commands[name]
        parsed = command.make_context(name, given).params
        assert str(parsed["run"]) == str(tmp_path)
        if name == "eval":
            asked = parse_requirements(parsed["require"], parsed["tasks"].split(","), parsed["answers"])
            assert [each.measure for each in asked] == ["held_out_loss", "arc_easy"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, which GitHub's runners have")
@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_its_script_ends_as_the_evaluation_does(status, scripts, tmp_path):
    (tmp_path / "nybble").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "nybble").chmod(0o755)
    (tmp_path / "report.md").write_text("# the report\n")
    given = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "RUN": tmp_path,
        "GITHUB_STEP_SUMMARY": tmp_path / "summary",
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", scripts[0]],
        env={**os.environ, **{name: str(value) for name, value in given.items()}}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert (tmp_path / "summary").read_text() == "# the report\n"
    assert ("::error::not shown" in done.stdout) == (status == 3)
