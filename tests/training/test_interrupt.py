"""Ctrl-C and SIGTERM while a run trains, by real signals: what was learnt is saved, and the run goes on from it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

import nybble.training.loop as loop
from nybble.run.folder import open_run
from nybble.run.log import read_metrics
from nybble.run.marks import read_mark
from nybble.training.interrupt import Interruption, Stopped
from nybble.training.train import resume, train
from tests.training.test_train import FAST, read_metrics_but_time, recipe_for

WORDS = ["train.max_steps=8", "train.evaluate_every=4", "train.samples=0", "lora.dropout=0.1"]


class Signals(TrainerCallback):
    """Signals in the middle of a step, counted from 1."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step = step
        self.numbers = numbers

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def stopped(monkeypatch, recipe, cache, *signals: object, during: str = "") -> tuple[Stopped, str]:
    """Train until a signal ends it; what it was, and what the terminal says."""

    class Interrupted(loop.QLoraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if not during:
                self.add_callback(Signals(*signals))

        def evaluation_loop(self, *args, **kwargs):
            if during and self.state.global_step == signals[0]:
                os.kill(os.getpid(), signals[1])
            return super().evaluation_loop(*args, **kwargs)

    console = Console(file=io.StringIO(), width=300)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "QLoraTrainer", Interrupted)
        with pytest.raises(Stopped) as caught:
            train(recipe, console=console, cache=cache)
    time.sleep(0.1)  # the notice comes from a thread
    print(console.file.getvalue())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return caught.value, console.file.getvalue()


@pytest.fixture(autouse=True)
def _usual_handlers():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tiny_llama, rows, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(recipe_for(tiny_llama, rows, out, *WORDS), console=Console(quiet=True), cache=cache)


@pytest.mark.parametrize(
    ("step", "number", "during"),
    [(1, signal.SIGTERM, ""), (2, signal.SIGINT, ""), (6, signal.SIGINT, ""), (4, signal.SIGINT, "evaluation")],
)
def test_the_step_is_finished_and_saved_and_the_run_resumes_as_if_nothing_had_happened(
    step, number, during, whole, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS)
    if step == 1:  # nothing is done before the end of the first step: the signal comes in the second
        step += 1
    found, told = stopped(monkeypatch, recipe, cache, step, number, during=during)
    assert found.number == number
    assert "stopping  after this step, with a checkpoint; Ctrl-C again stops at once, without one" in told
    assert f"checkpoint-{step} is complete; resume with: nybble train --resume {tmp_path / 'run'}" in told
    run = open_run(tmp_path / "run")
    assert run.latest_checkpoint().name == f"checkpoint-{step}"
    assert [line.step for line in read_metrics(run) if line.loss is not None][-1] == step
    resume(run.folder, console=quiet, cache=cache)
    assert read_metrics_but_time(run) == read_metrics_but_time(whole)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, whole.adapter)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("signals", [(1, signal.SIGINT), (1, signal.SIGTERM), (3, signal.SIGINT, signal.SIGINT)])
def test_before_a_step_is_done_and_at_the_second_signal_it_stops_at_once(
    signals, tiny_llama, rows, cache, tmp_path, monkeypatch
):
    _, told = stopped(monkeypatch, recipe_for(tiny_llama, rows, tmp_path / "runs" / "run", *WORDS), cache, *signals)
    assert "nothing of this run was kept" in told
    assert not list(tmp_path.glob("runs/*"))


def test_a_signal_in_the_last_step_changes_nothing(whole, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    class Interrupted(loop.QLoraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Signals(8, signal.SIGINT))

    monkeypatch.setattr(loop, "QLoraTrainer", Interrupted)
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=quiet, cache=cache)
    assert run.adapter.exists()
    assert read_metrics_but_time(run) == read_metrics_but_time(whole)


def test_ignored_signals_stay_ignored_and_other_handlers_stay(quiet):
    own = signal.signal(signal.SIGTERM, lambda *words: None)
    mine = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or a shell's background job
    try:
        with Interruption(quiet).listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, own)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_after_the_same_step(number, tiny_llama, rows, tmp_path):
    """The signal goes to the one that was started, as a terminal or a scheduler sends it."""
    out, words = tmp_path / "run", ["train.max_steps=120", "train.evaluate_every=100", "train.samples=0"]
    words += ["train.micro_batch=2", "train.accumulation=2"]

    def started(*command: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "nybble", "train", *map(str, command)],
            env={**os.environ, "HOME": str(tmp_path), "COLUMNS": "300"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    first = started(tiny_llama, rows, f"out={out}", *FAST, *words, "--processes", 2)
    metrics, began = out / "metrics.jsonl", time.time()
    while time.time() - began < 200 and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(number)
    told, errors = first.communicate(timeout=120)
    print(told, errors)
    assert first.returncode == 128 + number
    assert "Traceback" not in errors
    assert "error:" not in errors
    assert f"nybble train --resume {out}" in told
    step = int(open_run(out).latest_checkpoint().name.rpartition("-")[2])
    assert 0 < step < 100
    lines = read_metrics(open_run(out))
    assert [line.step for line in lines if line.loss is not None] == list(range(1, step + 1))
    written = read_mark(open_run(out).latest_checkpoint())["files"]
    assert {name for name in written if name.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}
    second = started("--resume", out)
    told, errors = second.communicate(timeout=300)
    print(told, errors)
    assert second.returncode == 0
    assert read_metrics(open_run(out))[: len(lines)] == lines
    assert json.loads((out / "summary.json").read_text())["steps"] == 120
