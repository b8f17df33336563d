"""Modules that lie in the current folder are not run, whatever nybble starts."""

# ruff: noqa: E501 - a template or a case is easier to read on one line

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nybble.errors import EvaluationError
from nybble.export.parity import loaders
from nybble.installed import module_command
from tests.conftest import ROOT

HOSTILE = ("typer.py", "torch.py", "json.py", "transformers.py", "llama_cpp.py", "tokenizers.py", "numpy.py", "re.py", "subprocess.py",
           "__future__.py", "sitecustomize.py", "usercustomize.py", "rich/__init__.py", "yaml/__init__.py", "jinja2/__init__.py",
           "multiprocessing/__init__.py")  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder full of modules that leave a mark when they are run."""
    folder = tmp_path / "place"
    for name in HOSTILE:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit({name!r})\n")
    return folder


def ran(tmp_path) -> str:
    return (tmp_path / "ran").read_text() if (tmp_path / "ran").exists() else ""


def started(words, place, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    clean |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(list(map(str, words)), cwd=place, env=clean, capture_output=True, text=True, timeout=280)


def test_a_process_that_nybble_starts_takes_none(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    for words in (
        module_command("nybble", "--version"),
        module_command("nybble", "train", "--help"),
        module_command("nybble.model.adapter.patterns", "nonsense"),
        module_command("nybble.model.tokenizer.expressions", "nonsense"),
        module_command(loaders.LLAMA_CPP, "no-job"),
    ):
        assert words[1:3] == ["-P", "-m"]
        done = started(words, place)
        assert ran(tmp_path) == "", done.stderr
    assert started(module_command("nybble", "--version"), place).returncode == 0


def test_python_m_nybble_forgets_the_current_folder(place, tmp_path):
    for name in (
        "__future__.py",
        "re.py",
    ):  # Python itself, and nybble/__init__.py, come before nybble can forget anything
        (place / name).unlink()
    done = started([sys.executable, "-m", "nybble", "--version"], place)
    assert (done.returncode, ran(tmp_path)) == (0, ""), done.stderr


def test_nybble_in_the_current_folder_is_still_found():
    code = "import nybble.installed as i; print(i.module_command('nybble', '--version')[1:])"
    alone = {"PYTHONPATH": ""}
    done = started([sys.executable, "-m", "nybble", "--version"], ROOT / "src", **alone)
    assert done.returncode == 0, done.stderr
    said = started([sys.executable, "-c", code], ROOT / "src", **alone)
    assert said.stdout.strip() == "['-m', 'nybble', '--version']"  # without -P, or it could not be imported


def test_a_script_that_lm_eval_would_run_is_refused(tmp_path, monkeypatch):
    harness = pytest.importorskip("nybble.evaluate.harness")
    monkeypatch.chdir(tmp_path)
    for name in harness.METRIC_SCRIPTS:
        harness._refuse_scripts()
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("raise SystemExit\n")
        with pytest.raises(EvaluationError, match=rf"the current folder has {name}/{name}\.py, which would be run"):
            harness._refuse_scripts()
        (tmp_path / name / f"{name}.py").unlink()


@pytest.mark.slow
def test_training_in_two_processes_takes_none(place, tmp_path, tiny_llama, rows):
    program = (
        "from nybble.cli import main; main()"  # what the script `nybble` does, which Python starts without this folder
    )
    words = [
        "train",
        tiny_llama,
        rows,
        "--processes",
        2,
        f"out={tmp_path / 'run'}",
        "model.device=cpu",
        "model.dtype=float32",
    ]
    words += [
        "train.max_steps=2",
        "data.validation=12",
        "data.max_length=128",
        "train.samples=0",
        "train.micro_batch=2",
    ]
    done = started([sys.executable, "-P", "-c", program, *words], place, HOME=str(tmp_path),
                   OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ran(tmp_path) == ""
    assert (tmp_path / "run" / "adapter").is_dir()
