"""The command line as users run it, in real processes."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

from nybble.distributed.launcher import SPIN_SETTINGS
from nybble.run.log import read_metrics
from tests.conftest import ROOT
from tests.training.test_train import FAST, losses, open_run, recipe_for, train


def nybble(*words: object, launcher=("-m", "nybble"), home=None, timeout=300, **environment: str):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "WORLD_"))}
    clean |= {"COLUMNS": "100", **({"HOME": str(home)} if home else {}), **environment}
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=clean, check=False)


def working_time() -> float:
    """Processor seconds of this process's children: on a busy machine, the clock would count other programs too."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_help_answers_at_once_and_without_torch():
    took = []
    for _ in range(3):
        began = working_time()
        result = nybble("--help")
        took.append(working_time() - began)
        assert result.returncode == 0
        assert all(command in result.stdout for command in ("doctor", "train", "chat", "demo"))
    assert min(took) < 0.5
    probe = (
        "import sys, nybble.cli; print([n for n in ('torch', 'transformers', 'datasets', 'wandb') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, SPIN_SETTINGS.get("GOMP_SPINCOUNT", "0")),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_that_wait_leave_the_cores_to_others(own, spins):
    """The settings that torch's OpenMP reports in a process started by the command line; what the user has set stays."""
    probe = (
        "import sys, contextlib; sys.argv[1:] = ['--version']\n"
        "from nybble.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "assert 'torch' not in sys.modules\n"
        "import torch"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP"))}
    told = subprocess.run(
        [sys.executable, "-c", probe],
        env={**clean, **own, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told)
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch's OpenMP is not GNU's here")
    assert all(count == spins or (spins is None and int(count) > 300_000) for count in counts), told


def test_the_version_is_the_changelogs():
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert nybble("--version").stdout.split() == ["nybble", newest.removeprefix("## ").split(" ")[0]]


def test_print_config_prints_a_recipe_that_train_reads(tmp_path):
    printed = nybble("train", "m", "d.jsonl", "lora.r=4", "--print-config")
    assert printed.returncode == 0
    file = tmp_path / "recipe.yaml"
    file.write_text(printed.stdout)
    again = nybble("train", "-c", file, "train.epochs=2", "--print-config")
    assert again.stdout == printed.stdout.replace("epochs: 1.0", "epochs: 2.0")
    assert "  r: 4\n" in again.stdout


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["train", "m", "d", "lora.rr=4", "train.epoch=2"], 2, "did you mean lora.r=4?"),
        (["train", "a", "b", "c"], 2, "at most MODEL and DATA"),
        (["help", "nothing"], 2, "there is no command nothing"),
        (["train"], 2, "MODEL is missing"),
        (["train", "--resume", "/nowhere"], 1, "there is no folder /nowhere"),
        (["train", "--resume", "/nowhere", "lora.r=2"], 2, "takes no other option"),
        (["train", "/nowhere/model", "d.jsonl"], 1, "there is no folder /nowhere/model"),
        (["train", "-c", "/nowhere.yaml"], 2, "there is no recipe /nowhere.yaml"),
        (["chat", "/nowhere"], 1, "there is no folder /nowhere"),
        (["serve", "/nowhere"], 1, "there is no folder /nowhere"),
    ],
)
def test_bad_arguments_get_one_message_and_a_status(words, status, message, here):
    result = here(*words)
    print(result.stderr)
    assert result.returncode == status
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_person_trains_and_chats(tiny_llama, rows, tmp_path, here, monkeypatch):
    out = tmp_path / "run"
    trained = nybble("train", tiny_llama, rows, f"out={out}", *FAST, "train.max_steps=3", home=tmp_path)
    print(trained.stdout, trained.stderr)
    assert trained.returncode == 0
    for part in (
        "device ",
        "80 rows (alpaca), template alpaca",
        "in nf4",
        "trained parameters",
        "validation loss",
        "done",
    ):
        assert part in trained.stdout
    assert trained.stderr == "", "libraries talk"
    chat = nybble("chat", out, "--prompt", "say one", "--compare", "--max-new-tokens", "5", home=tmp_path)
    print(chat.stdout, chat.stderr)
    assert chat.returncode == 0
    assert chat.stdout.splitlines()[0] == "base"
    assert "tuned" in chat.stdout
    cut = "(cut off after 5 tokens; --max-new-tokens allows more)\n"
    assert chat.stderr == cut * chat.stderr.count(cut), "libraries talk"
    monkeypatch.setattr(sys, "stdin", io.StringIO("say one\n\n/new\nsay two\n/exit\n"))
    talk = here("--cache", tmp_path / ".cache" / "nybble", "chat", out, "--max-new-tokens", "4")
    assert talk.returncode == 0
    assert talk.stdout.count("you> ") == 5


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tiny_llama, rows, cache, tmp_path, quiet):
    words = ["train.max_steps=4", "train.learning_rate=1e-3", "train.micro_batch=2", "data.validation=7"]
    one = train(
        recipe_for(tiny_llama, rows, tmp_path / "one", *words, "train.accumulation=4"), console=quiet, cache=cache
    )
    out = tmp_path / "two"
    parts = [tiny_llama, rows, f"out={out}", *FAST, *words, "train.accumulation=2"]
    result = nybble("train", *parts, "--processes", "2", home=tmp_path)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert result.stderr == "", "libraries talk"
    two = open_run(out)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    evaluations = [[line.eval_loss for line in read_metrics(run) if line.eval_loss is not None] for run in (one, two)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5)
    tokens = [json.loads((run.folder / "summary.json").read_text())["processes"] for run in (one, two)]
    assert tokens == [1, 2]


LAUNCH = ("-m", "accelerate.commands.launch")


@pytest.mark.slow
def test_accelerate_launch_runs_two_processes_and_a_wrong_number_is_an_error(tiny_llama, rows, tmp_path):
    parts = [tiny_llama, rows, *FAST, "train.max_steps=2", "train.processes=2"]
    both = ("--multi_gpu", "--num_processes", "2", "-m", "nybble", "train", *parts, f"out={tmp_path / 'both'}")
    result = nybble(*both, launcher=LAUNCH, home=tmp_path, ACCELERATE_USE_CPU="true")
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert len(losses(open_run(tmp_path / "both"))) == 2
    silent = ("--cpu", "--num_processes", "2", "-m", "nybble", "train", *parts, f"out={tmp_path / 'one'}")
    result = nybble(*silent, launcher=LAUNCH, home=tmp_path)
    print(result.stderr)
    assert result.returncode != 0
    assert "2 processes were requested, but accelerate launch started 1 process" in result.stderr
    unsaid = ("--multi_gpu", "--num_processes", "2", "-m", "nybble", "train", *parts[:-1], f"out={tmp_path / 'unsaid'}")
    result = nybble(*unsaid, launcher=LAUNCH, home=tmp_path)
    assert result.returncode != 0
    assert "1 process was requested, but accelerate launch started 2 processes" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("*/recipe.yaml")) == ["recipe.yaml"]


def lines(out) -> int:
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_step(process, out, more: int) -> None:
    """Until the process has written so many lines of metrics."""
    start, began = None, time.time()
    while process.poll() is None and time.time() - began < 120:
        if start is None or lines(out) < start:
            start = lines(out)  # a resumed run first forgets the lines after its checkpoint
        if lines(out) >= start + more:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_can_be_resumed(tiny_llama, rows, tmp_path):
    out, words = tmp_path / "run", ["train.max_steps=200", "train.evaluate_every=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nybble", "train", tiny_llama, rows, f"out={out}", *FAST, *words],
        env={**os.environ, "HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_step(process, out, 8)
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate()
    assert process.returncode == 130
    assert f"nybble train --resume {out}" in told
    assert errors == ""
    assert open_run(out).latest_checkpoint() is not None


def test_the_cache_is_in_the_given_folder(tiny_llama, rows, tmp_path, here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for words, place in ((("--cache", tmp_path / "named"), tmp_path / "named"), ((), tmp_path / "xdg" / "nybble")):
        assert here(*words, "data", "check", rows, tiny_llama, "data.max_length=256").returncode == 0
        assert len(list(place.glob("tokens/*/tokens.arrow"))) == 1


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("train m rows.jsonl --cache /x lora.r=4", "--cache /x train m rows.jsonl lora.r=4"),
        ("data check rows.jsonl --cache=/x", "--cache=/x data check rows.jsonl"),
        ("chat runs/a --cache /x --compare", "--cache /x chat runs/a --compare"),
        ("export runs/a --version --to gguf", "--version export runs/a --to gguf"),
    ],
)
def test_the_program_s_own_options_go_before_the_command(typed, right, here):
    told = here(*typed.split())
    print(told.stderr)
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1].split("fix:")[1].strip() == f"nybble {right}"


def test_data_is_checked_and_previewed_from_the_command_line(tiny_llama, rows, tmp_path, here):
    fit = here("--cache", tmp_path / "cache", "data", "check", rows, tiny_llama, "data.max_length=256")
    assert fit.returncode == 0, fit.stderr
    assert fit.stdout.rstrip().endswith("\nready to train")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a"}\n')
    unfit = here("data", "check", bad)
    assert unfit.returncode == 1
    assert f"{bad}:1" in unfit.stdout
    seen = here("data", "preview", rows, tiny_llama, "-n", 2)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.count("</s>]]") == 2
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"instruction": "\\u4f60", "output": "caf\\u00e9"}\n')
    seen = nybble("data", "preview", odd, tiny_llama, home=tmp_path, PYTHONIOENCODING="ascii")
    assert seen.returncode == 0, seen.stderr
    for words, message in ((("check",), "DATA is missing"), (("preview", rows), "MODEL is missing")):
        result = here("data", *words)
        assert result.returncode != 0
        assert message in result.stderr + result.stdout
