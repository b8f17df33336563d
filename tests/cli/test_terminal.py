"""What a person reads: lines at every width, help, completion."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.text import Text

from nybble.cli.keys import EXAMPLES, KEYS
from nybble.data import histogram
from nybble.recipe import Recipe, option_names
from nybble.terminal import COMMAND, bytes_text, tell, tell_error
from tests.conftest import ROOT

LINE = "run       runs/tiny-rows: 4 steps of 16 rows (micro batch 4, accumulation 4), 2 rows of 東京と大阪の資料 held out for it"
ERROR = """2 of 42 rows cannot be trained on:
  rows.jsonl, lines 41 to 42: a row without an answer: 'completion' is empty in every one of these rows here
  where: rows.jsonl:41
  fix:   nybble data check rows.jsonl models/a-model-with-a-long-name data.bad_rows=drop data.max_length=2048 lora.r=4"""


def written(width, *lines, terminal=True, tell=tell):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    for line in lines:
        tell(console, line)
    return console.file.getvalue().splitlines(), console


def test_bytes_have_one_spelling():
    assert [bytes_text(13.5e9), bytes_text(3e6), bytes_text(0)] == ["13.50 GB", "0.00 GB", "0.00 GB"]
    assert bytes_text(2.5e8, 1, "MB") == "250.0 MB"
    sizes = {999: "999 bytes", 1000: "1.0 kB", 1_500_000: "1.5 MB", 10**10: "10.0 GB"}
    assert {count: bytes_text(count, 1, None) for count in sizes} == sizes


@pytest.mark.parametrize("width", [20, 30, 34, 40, 60, 80, 99, 140])
def test_a_line_wraps_at_words_and_hangs(width):
    lines, _ = written(width, LINE)
    assert all(Text(line).cell_len <= width for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(LINE.split()), "no word is broken, and none is lost"
    hang = 10 if width >= 34 else 2
    assert all(line.startswith(" " * hang) and line[hang] != " " for line in lines[1:])
    assert (len(lines) == 1) == (width > Text(LINE).cell_len)


@pytest.mark.parametrize("width", [20, 60, 80, 140])
def test_in_a_pipe_every_line_stays_whole(width):
    assert written(width, LINE, terminal=False)[0] == [LINE]


@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_an_error_hangs_under_its_parts_and_its_command_stays_whole(width):
    lines, _ = written(width, ERROR, tell=lambda console, text: tell_error(console, "", text))
    print("\n".join(lines))
    assert lines[0].startswith("error: 2 of 42 rows")
    assert any(line.strip().startswith("where: rows.jsonl:41") for line in lines)
    command = ERROR.rsplit("fix:   ", 1)[1]
    assert sum(command in line for line in lines) == 1, "a command that is copied was broken"
    prose = [line for line in lines if command not in line]
    assert all(len(line) <= width for line in prose)
    assert all(line.startswith("    ") for line in lines[2:] if "answer" in line)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("nybble train --resume runs/a to go on, or out=B", "nybble train --resume runs/a to go on"),
        ("done      runs/a; talk to it: nybble chat runs/a", "nybble chat runs/a"),
        ("pip install 'nybble[eval]', or --tasks none", "pip install 'nybble[eval]'"),
        ('pip install uv && uv pip install "torch<3,>=2" x; then', 'pip install uv && uv pip install "torch<3,>=2" x'),
        (
            "python -c 'import a; print(b, 1)' > key.txt, then --api-key-file",
            "python -c 'import a; print(b, 1)' > key.txt",
        ),
        ("nybble eval RUN shows the run's answers, and more", "nybble eval RUN shows the run's answers"),
        ("`hf auth login` with a token from there", "hf auth login"),
        ("`hf cache ls`, or set HF_HOME", "hf cache ls"),
        ("data.map=a:b, or 'data.map={a: b, c: d}'", "'data.map={a: b, c: d}'"),
        ("nybble trains models of the Llama architecture", None),
        ("a lower train.learning_rate", None),
        ("gzip-compressed text and jq-like words", None),
    ],
)
def test_a_command_in_a_sentence_is_known(text, command):
    found = COMMAND.search(text)
    assert (found and found[0]) == command


@pytest.mark.parametrize("room", [30, 49, 69, 129])
def test_the_histogram_fits_the_terminal(room):
    lengths = {n: 1 + n % 7 for n in range(40, 3000)}
    lines = [line for line, _ in histogram.text(lengths, 1000, "#", room)]
    assert max(map(len, lines)) <= room
    assert any("#" in line for line in lines)


def test_help_shows_examples_and_the_keys_used_most(here):
    shown = here("train", "--help").stdout
    assert all(line in shown for line, _ in EXAMPLES["train"])
    assert len(KEYS) == 10
    assert set(KEYS) <= set(option_names())
    assert f"{Recipe().train.learning_rate:g}" in shown
    words = " ".join(shown.split())
    assert "Peak learning rate. LoRA needs about ten times that of full fine-tuning." in words
    assert "[q_proj, v_proj]" in words
    assert here("help", "train").stdout == shown
    assert here("help").stdout == here("--help").stdout
    assert "Write a plot of the row lengths" in here("help", "data", "check").stdout


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_command_shows_its_own_examples(command, here):
    shown = here(command, "--help").stdout
    for name, examples in EXAMPLES.items():
        assert all(line.startswith(f"nybble {name} ") and (line in shown) == (name == command) for line, _ in examples)


@pytest.mark.parametrize("line", [line for line, _ in EXAMPLES["train"] if "--resume" not in line])
def test_the_examples_are_understood(line, here, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = here(*line.split()[1:], "--print-config")
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("nybble tr", ["train"]),
        ("nybble train m rows.jsonl train.ep", ["train.epochs=", "train.epochs=1"]),
        ("nybble train m rows.jsonl lora.d", ["lora.dropout=", "lora.dora="]),
        ("nybble train m rows.jsonl model.dtype=fl", ["model.dtype=float16", "model.dtype=float32"]),
        ("nybble train m ro", ["rows.jsonl"]),
        ("nybble data check runs/", ["runs/a b/"]),
    ],
)
def test_a_shell_completes_commands_options_and_files(typed, offered, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "runs" / "a b").mkdir(parents=True)
    program = "import sys; sys.argv = ['nybble']; from nybble.cli import main; main()"
    environment = {"_NYBBLE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    said = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert said.stdout.splitlines() == offered, said.stderr
