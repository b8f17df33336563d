"""Sweeps on a tiny Llama: each trial as if it were trained alone, on one base; kills, failures, the report."""

from __future__ import annotations

import gc
import io
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import wandb
import yaml
from rich.console import Console
from safetensors.torch import load_file

import nybble.training.train as training
from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.data.rows.formats import Message
from nybble.errors import RunError, TrainingError
from nybble.recipe import load_recipe
from nybble.run.folder import Run, open_run
from nybble.sweep.request import sweep_request, trial_folder
from nybble.sweep.space import read_space
from nybble.sweep.study import OngoingTrial, SweepStudy, best
from nybble.sweep.sweep import held_out_loss, sweep
from nybble.training.interrupt import Stopped
from nybble.training.shared_parts import SharedParts
from nybble.training.train import train
from tests.conftest import ROOT

FAST = [
    *("model.device=cpu", "model.dtype=float32", "data.max_length=128", "data.validation=8", "train.samples=0"),
    *("train.micro_batch=4", "train.accumulation=1", "train.max_steps=4", "train.evaluate_every=2"),
]
RATES = "train.learning_rate=1e-3..3e-2"


def request(model, data, out, *words: str, trials: int = 3):
    return sweep_request(read_space([f"model.path={model}", f"data.path={data}", f"out={out}", *FAST, *words]), trials)


def results(asked):
    study = SweepStudy(
        asked.folder, asked.searched.space, asked.recipe.model_dump(mode="json", exclude={"out"}), asked.trials, 42
    )
    found = study.results()
    study.close()
    return found


def said() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def swept(tiny_llama, rows, cache, tmp_path_factory):
    """A sweep, shared by the tests that only look at one; the base is loaded once."""
    asked = request(tiny_llama, rows, tmp_path_factory.mktemp("sweeps") / "sweep", RATES, "lora.r=4,8", trials=4)
    loads = []
    original, training.load_base = training.load_base, lambda *all: loads.append(1) or original(*all)
    try:
        sweep(asked, Console(quiet=True), cache)
    finally:
        training.load_base = original
    assert len(loads) == 1
    return asked


def test_each_trial_is_the_run_that_nybble_train_makes_of_its_recipe(swept, cache, quiet, tmp_path):
    last = results(swept)[-1]
    recipe = swept.searched.recipe(last.settings).model_copy(update={"out": str(tmp_path / "alone")})
    watched = []
    alone = train(
        recipe, console=quiet, cache=cache, watch=lambda number, loss, is_last: watched.append((number, loss, is_last))
    )
    trial = trial_folder(swept.folder, last.number)
    assert {name: tensor.tolist() for name, tensor in adapter(trial).items()} == {
        name: tensor.tolist() for name, tensor in adapter(alone.folder).items()
    }
    assert held_out_loss(alone) == last.loss
    assert [(number, is_last) for number, _, is_last in watched] == [(1, False), (2, True)]
    assert list(last.losses) == [loss for _, loss, _ in watched][: len(last.losses)]


def test_a_trial_is_an_ordinary_run(swept, cache):
    number = results(swept)[0].number
    run = open_run(trial_folder(swept.folder, number))
    assert run.summary().learning_rate == run.recipe.train.learning_rate
    answer = load_answerer(run.folder, cache).answer([(Message("user", "say one"),)], Sampling(max_new_tokens=4))
    assert isinstance(answer[0], str)
    assert run.recipe.tracker.group == "sweep"


def test_only_the_best_keeps_its_checkpoints(swept):
    kept = best(results(swept))
    for each in results(swept):
        has = bool(Run(trial_folder(swept.folder, each.number), swept.recipe).numbered_checkpoints())
        assert has == (each == kept)


def test_the_report_and_the_best_recipe(swept):
    kept = best(results(swept))
    assert load_recipe(swept.folder / "best.yaml").train.learning_rate == float(kept.settings["train.learning_rate"])
    page = (swept.folder / "report.html").read_text()
    assert f"{kept.loss:.4f}" in page
    assert all(f"{each.number:03}" in page for each in results(swept))
    assert not re.search(r"(src|href)=\"(?!#)", page), "the page loads nothing"
    for name in ("history", "parallel"):
        assert (swept.folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert page.count(f'id="{name}-wide-') >= 1


def test_a_name_with_markup_is_shown_as_it_is(tiny_llama, rows, cache, tmp_path, quiet):
    asked = request(tiny_llama, rows, tmp_path / "<b>x", "lora.r=4,8", trials=1)
    sweep(asked, quiet, cache)
    page = (asked.folder / "report.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


def test_the_same_command_does_nothing_more_and_more_trials_go_on(swept, cache):
    console = said()
    before = results(swept)
    sweep(swept, console, cache)
    assert results(swept) == before
    text = console.export_text()
    assert "best      train.learning_rate=" in text
    assert f"nybble train -c {swept.folder}/best.yaml" in text


def test_a_finite_space_has_no_more_trials_than_combinations(tiny_llama, rows, cache, tmp_path):
    console = said()
    asked = request(tiny_llama, rows, tmp_path / "s", "lora.r=4,8", trials=5)
    sweep(asked, console, cache)
    assert sorted(each.settings["lora.r"] for each in results(asked)) == ["4", "8"]
    assert "the space has 2 combinations, so there are 2 trials, not 5" in console.export_text()
    assert "2 of 2" in (asked.folder / "report.html").read_text()


def test_another_sweep_in_its_folder_is_refused(swept, tiny_llama, rows, cache, quiet):
    other = request(tiny_llama, rows, swept.folder, "train.learning_rate=1e-3..1e-1", "lora.r=4,8", "train.warmup=0")
    with pytest.raises(RunError, match="is another sweep") as refusal:
        sweep(other, quiet, cache)
    print(refusal.value)
    assert "space.train.learning_rate: '0.001..0.03, logarithmic' -> '0.001..0.1, logarithmic'" in str(refusal.value)
    assert "train.warmup: 0.03 -> 0.0" in str(refusal.value)


def test_a_folder_that_is_no_sweep_is_refused(tiny_llama, rows, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is no sweep") as refusal:
        request(tiny_llama, rows, tmp_path, "lora.r=4,8")
    print(refusal.value)


def test_a_damaged_study_is_one_message(tiny_llama, rows, cache, tmp_path, quiet):
    (tmp_path / "study.db").write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(RunError, match="the study cannot be read") as refusal:
        sweep(request(tiny_llama, rows, tmp_path, "lora.r=4,8"), quiet, cache)
    print(refusal.value)


def test_memory_does_not_grow_from_trial_to_trial(tiny_llama, rows, cache, quiet, tmp_path):
    parts, sizes, states = SharedParts(), [], []
    for number in range(4):
        recipe = load_recipe(None, [
            f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / str(number)}", *FAST,
            f"lora.r={(4, 8)[number % 2]}", f"engine.fused={('true', 'true', 'false', 'false')[number]}",
        ])  # fmt: skip
        train(recipe, console=quiet, cache=cache, parts=parts)
        base = parts._base.model
        gc.collect()
        tensors = {id(each): each for each in gc.get_objects() if isinstance(each, torch.Tensor)}
        sizes.append(sum(each.numel() * each.element_size() for each in tensors.values()))
        states.append(sorted((name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks),
                              "forward" in module.__dict__) for name, module in base.named_modules()))  # fmt: skip
        assert not any("lora" in name for name, _ in base.named_parameters())
        assert not any(parameter.requires_grad for parameter in base.parameters())
    assert parts.loads == 1
    assert states[0] == states[1] == states[2] == states[3]
    assert max(sizes) - min(sizes) < 0.02 * min(sizes), sizes


def test_a_base_in_which_a_training_failed_is_loaded_again(tiny_llama, rows, cache, quiet, tmp_path, monkeypatch):
    parts = SharedParts()
    recipe = load_recipe(None, [f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / 'run'}", *FAST])

    def broken(*_):
        raise TrainingError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_trainer", broken)
        with pytest.raises(TrainingError):
            train(recipe, console=quiet, cache=cache, parts=parts)
    train(recipe, console=quiet, cache=cache, parts=parts)
    assert parts.loads == 2


def test_a_diverged_trial_is_a_failed_trial(tiny_llama, rows, cache, tmp_path):
    console = said()
    asked = request(tiny_llama, rows, tmp_path / "s", "train.learning_rate=1e-2,1e18,2e-2", "train.max_grad_norm=1e9")
    sweep(asked, console, cache)
    by_rate = {each.settings["train.learning_rate"]: each for each in results(asked)}
    assert by_rate["1e18"].outcome == "failed"
    assert by_rate["1e-2"].outcome == by_rate["2e-2"].outcome == "complete", "each of a finite space is tried once"
    assert re.search(r"trial \d+ failed: ", console.export_text())
    assert "failed: " in (asked.folder / "report.html").read_text()


def test_out_of_memory_is_a_failed_trial(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    original = training.run_trainer

    def too_large(run, setup, *rest):
        if setup.recipe.lora.r == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(run, setup, *rest)

    monkeypatch.setattr(training, "run_trainer", too_large)
    asked = request(tiny_llama, rows, tmp_path / "s", "lora.r=4,8,16")
    sweep(asked, quiet, cache)
    assert {each.settings["lora.r"]: each.outcome for each in results(asked)} == {
        "4": "complete", "8": "failed", "16": "complete",
    }  # fmt: skip


def test_a_sweep_whose_trials_all_fail_stops(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    def broken(*_):
        raise TrainingError("the loss of step 1 is not finite")

    monkeypatch.setattr(training, "run_trainer", broken)
    with pytest.raises(TrainingError, match="the first 3 trials failed; the last because the loss of step 1") as stop:
        sweep(request(tiny_llama, rows, tmp_path / "s", RATES, trials=9), quiet, cache)
    print(stop.value)


def test_an_interrupted_sweep_tries_the_same_settings_again(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    asked, whole = (request(tiny_llama, rows, tmp_path / name, RATES) for name in ("interrupted", "whole"))
    sweep(whole, quiet, cache)
    original = OngoingTrial.watch

    def stop(self, evaluation, loss, is_last):
        if self.number == 1:
            raise Stopped(signal.SIGINT)
        return original(self, evaluation, loss, is_last)

    with monkeypatch.context() as patch:
        patch.setattr(OngoingTrial, "watch", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(asked, quiet, cache)
    console = said()
    sweep(asked, console, cache)
    assert "trial 001 was interrupted: its settings are tried again" in console.export_text()
    ended = results(asked)
    assert [each.outcome == "killed" for each in ended] == [False, True, False, False]
    assert ended[1].settings == ended[2].settings
    assert not trial_folder(asked.folder, 1).exists()
    left = [(each.settings, each.loss) for each in ended if each.outcome != "killed"]
    assert left == [(each.settings, each.loss) for each in results(whole)], "it finds what it would have found"


def test_a_sweep_that_is_killed_goes_on(tiny_llama, rows, cache, tmp_path, quiet):
    asked = request(tiny_llama, rows, tmp_path / "s", RATES, trials=2)
    words = [f"model.path={tiny_llama}", f"data.path={rows}", f"out={asked.folder}", *FAST, RATES]
    command = [sys.executable, "-m", "nybble", "--cache", str(cache), "sweep", *words, "--trials", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = trial_folder(asked.folder, 0) / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was killed while it trained"
    sweep(asked, quiet, cache)
    ended = results(asked)
    assert ended[0].outcome == "killed"
    assert ended[1].settings == ended[0].settings
    assert [each.outcome for each in ended[1:]] == ["complete", "complete"]


def test_a_settings_that_kills_its_process_is_given_up(tiny_llama, rows, tmp_path):
    asked = request(tiny_llama, rows, tmp_path / "s", RATES)
    asked.folder.mkdir()
    for _ in range(4):
        study = SweepStudy(asked.folder, asked.searched.space, {}, 3, 42)
        study.retry_killed()
        trial = study.ask()
        study.close()
    study = SweepStudy(asked.folder, asked.searched.space, {}, 3, 42)
    ended = study.results()
    study.close()
    assert [each.outcome for each in ended] == ["killed", "killed", "failed"]
    assert ended[2].why == "its process was killed, 3 times"
    assert trial.settings != ended[2].settings


def test_a_trial_that_is_worse_than_the_median_ends_early(tiny_llama, rows, cache, quiet, tmp_path):
    steps = ["train.max_steps=6", "train.evaluate_every=1", "train.save_every=1"]
    asked = request(tiny_llama, rows, tmp_path / "s", "train.learning_rate=1e-2,2e-2,3e-2,1e-6", *steps, trials=4)
    sweep(asked, quiet, cache)
    by_rate = {each.settings["train.learning_rate"]: each for each in results(asked)}
    slow = by_rate["1e-6"]
    if slow.number == 3:  # the three before it are those it is compared with
        assert slow.outcome == "pruned"
    for each in by_rate.values():
        run = open_run(trial_folder(asked.folder, each.number))
        assert run.summary().steps == (len(each.losses) if each.outcome == "pruned" else 6)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_trial_that_is_worse_only_at_its_end_has_not_ended_early(is_last, tiny_llama, rows, tmp_path):
    asked = request(tiny_llama, rows, tmp_path / "s", RATES)
    asked.folder.mkdir()
    study = SweepStudy(asked.folder, asked.searched.space, {}, 3, 42)
    for number in range(4):
        trial, losses = study.ask(), [1.0, 0.9, 0.8 if number < 3 else 5.0]
        ended = [trial.watch(place, loss, is_last and place == 3) for place, loss in enumerate(losses, 1)]
        result = study.tell(trial, losses[-1], "", 1.0)
    study.close()
    assert ended == [False, False, not is_last]
    assert result.outcome == ("complete" if is_last else "pruned")


def test_in_a_terminal_the_bars_of_sweep_and_run_do_not_meet(tiny_llama, rows, cache, tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    sweep(request(tiny_llama, rows, tmp_path / "s", RATES, trials=2), console, cache)
    assert "held-out loss" in stream.getvalue()


def test_trials_are_one_group_in_wandb(tiny_llama, rows, cache, quiet, tmp_path, monkeypatch):
    started, original = [], wandb.init
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **given: started.append(given) or original(**given))
    sweep(request(tiny_llama, rows, tmp_path / "group", RATES, "tracker.to=wandb", trials=2), quiet, cache)
    assert [(each["group"], each["name"]) for each in started] == [("group", "000"), ("group", "001")]


def test_the_command_line(here, tiny_llama, rows, tmp_path):
    words = [tiny_llama, rows, f"out={tmp_path / 's'}", *FAST]
    ended = here("sweep", *words, "lora.r=4,8", "--trials", "2", "--processes", "1")
    assert ended.returncode == 0, ended.stderr
    assert "held-out loss" in ended.stdout
    assert "to train it again: nybble train -c" in ended.stdout
    wrong = here("sweep", *words, "lora.r=8..4")
    print(wrong.stderr)
    assert wrong.returncode == 2
    assert "lora.r=8..4 is an empty range" in wrong.stderr
    both = here("sweep", "--find-lr", *words, "lora.r=4,8")
    print(both.stderr)
    assert "--find-lr searches the learning rate alone, not lora.r" in both.stderr


def test_a_wandb_sweep_file_drives_nybble_train(here):
    """What `wandb agent` makes of examples/wandb-sweep.yaml: the command, with key=value for each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    file = yaml.safe_load((ROOT / "examples" / "wandb-sweep.yaml").read_text())
    chosen = {"args": {"train.learning_rate": {"value": 0.00031622776601683794}, "lora.r": {"value": 8}}}
    assert file["parameters"].keys() == chosen["args"].keys()
    arguments = create_sweep_command_args(chosen)
    words = [part for word in file["command"] for part in (arguments[word[2:-1]] if word.startswith("${") else [word])]
    assert words[:2] == ["nybble", "train"]
    ended = here(*words[1:], "--print-config")
    assert ended.returncode == 0, ended.stderr
    recipe = yaml.safe_load(ended.stdout)
    assert recipe["train"]["learning_rate"] == 0.00031622776601683794
    assert recipe["lora"]["r"] == 8
    assert recipe["tracker"]["to"] == "wandb"


def test_without_optuna_the_message_is_the_command_that_installs_it(here, tiny_llama, rows, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nybble.sweep")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    ended = here("sweep", tiny_llama, rows, "lora.r=4,8", f"out={tmp_path / 's'}")
    print(ended.stderr)
    assert ended.returncode != 0
    assert "a sweep needs Optuna, which is not installed" in ended.stderr
    assert "[sweep]" in ended.stderr
    assert not (tmp_path / "s").exists()
