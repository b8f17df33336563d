"""Checkpoints: what is removed and what never is, damage of every byte, and runs that were killed at their very end."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib
import random
import shutil

import pytest
import torch
from rich.console import Console

import nybble.training.loop as loop
import nybble.training.train as training
from nybble.errors import RunError
from nybble.files.digests import describe
from nybble.recipe import Recipe
from nybble.run.folder import Run, open_run
from nybble.run.marks import check_adapter, read_mark
from nybble.training.checkpoints import (
    faults_of,
    mark_complete,
    prepare_resumption,
    remove_old,
    remove_unfinished,
    resumption,
    start_checkpoint,
)
from nybble.training.train import resume, train
from nybble.training.trainer import QLoraTrainer
from tests.training.test_train import Interrupt, adapter_of, interrupted, read_metrics_but_time, recipe_for

WORDS = [
    "train.max_steps=4",
    "train.evaluate_every=2",
    "train.samples=0",
    "train.micro_batch=8",
    "train.accumulation=1",
]
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class Killed(BaseException):
    """In place of a signal that cannot be caught: nothing in nybble catches it."""


def saved(run: Run, step: int, *, whole: bool = True) -> pathlib.Path:
    """A checkpoint by its files' names."""
    folder = run.checkpoints / f"checkpoint-{step}"
    start_checkpoint(folder)
    for name in FILES:
        (folder / name).write_text(f"{name} of {step}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    if whole:
        mark_complete(folder, {"seconds": 1.0, "peak_memory": 1})
    return folder


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return Run(tmp_path / "run", Recipe())


def names(run: Run) -> set[str]:
    return {path.name for path in run.checkpoints.iterdir()}


def test_the_newest_and_the_best_stay_and_other_folders_are_not_removed(run, tmp_path):
    for step in (2, 4, 6, 8, 10):
        saved(run, step)
    (run.checkpoints / "checkpoint-2" / "notes.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run.checkpoints / "checkpoint-6", elsewhere)
    (run.checkpoints / "checkpoint-6").symlink_to(elsewhere)
    others = {"checkpoint-best", "checkpoint-foo", "checkpoint-1-old", "checkpoint-01", "set-aside-checkpoint-1"}
    for name in others:
        shutil.copytree(run.checkpoints / "checkpoint-4", run.checkpoints / name)
    (run.checkpoints / "checkpoint-1").mkdir()  # without a mark nobody knows what it is
    for age, step in enumerate((10, 8, 4, 2)):  # a copy has other times
        os.utime(run.checkpoints / f"checkpoint-{step}", (age, age))
    before = {name: describe(run.checkpoints / name) for name in names(run)}
    remove_old(run, "/where/it/was/checkpoint-4")
    kept = {"checkpoint-10", "checkpoint-8", "checkpoint-4", "checkpoint-2", "checkpoint-6", "checkpoint-1", *others}
    assert names(run) == kept
    remove_old(run, None)
    assert names(run) == kept - {"checkpoint-4"}
    (run.checkpoints / "checkpoint-2" / "COMPLETE").write_text("{")
    remove_old(run, None)
    (run.checkpoints / "checkpoint-2" / "COMPLETE").unlink()
    remove_unfinished(run)
    assert names(run) == kept - {"checkpoint-4"}
    del before["checkpoint-2"]
    assert all(describe(run.checkpoints / name) == entries for name, entries in before.items() if name in names(run))
    assert (elsewhere / "optimizer.pt").is_file()


def test_unfinished_checkpoints_are_removed_and_unmarked_ones_are_not(run):
    saved(run, 2)
    saved(run, 4, whole=False)
    half_removed = run.checkpoints / ".unfinished-checkpoint-1"
    half_removed.mkdir()
    (run.checkpoints / "checkpoint-6").mkdir()
    (run.checkpoints / "checkpoint-6" / "adapter_model.safetensors").write_text("the only copy")
    found = resumption(run)
    assert found.checkpoint.name == "checkpoint-2"
    assert {place.name for place in found.skipped} == {"checkpoint-6"}
    notices = prepare_resumption(found)
    print(notices)
    lacking = "COMPLETE, optimizer.pt, scheduler.pt, trainer_state.json, rng_state*.pth"
    told = f"checkpoint-6: it is not marked as complete (there is no {lacking}); it is now set-aside-checkpoint-6"
    assert told in notices
    assert "metrics.jsonl has no line for 2 of 2 steps" in notices[-1]
    assert names(run) == {"checkpoint-2", "set-aside-checkpoint-6"}
    (run.checkpoints / "checkpoint-6").mkdir()
    prepare_resumption(resumption(run))
    assert names(run) == {"checkpoint-2", "set-aside-checkpoint-6", "set-aside-checkpoint-6-2"}
    assert (run.checkpoints / "set-aside-checkpoint-6" / "adapter_model.safetensors").read_text() == "the only copy"


def test_a_kill_between_the_two_marks_leaves_a_checkpoint_whole(run):
    """And it stays, if later a copy loses COMPLETE."""
    folder = saved(run, 2)
    (folder / "WRITING").write_text("")
    found = resumption(run)
    assert found.checkpoint == folder
    prepare_resumption(found)
    assert not (folder / "WRITING").exists()
    (folder / "COMPLETE").unlink()
    remove_unfinished(run)
    assert (folder / "optimizer.pt").exists()


def test_anything_at_a_checkpoint_s_path_is_set_aside(run):
    (run.checkpoints / "checkpoint-2").write_text("a file of mine")
    (run.checkpoints / "checkpoint-4").symlink_to("nowhere")
    for step in (2, 4, 6):
        saved(run, step)
    saved(run, 6)
    assert (run.checkpoints / "set-aside-checkpoint-2").read_text() == "a file of mine"
    assert names(run) >= {"set-aside-checkpoint-4", "set-aside-checkpoint-6", "checkpoint-6"}
    assert all(not faults_of(run.checkpoints / f"checkpoint-{step}") for step in (2, 4, 6))


def test_only_cut_off_checkpoints_let_a_run_start_over_and_only_unmarked_ones_do_not(run):
    saved(run, 2, whole=False)
    assert resumption(run).checkpoint is None
    shutil.rmtree(run.checkpoints / "checkpoint-2")
    (saved(run, 2) / "COMPLETE").unlink()
    with pytest.raises(RunError) as caught:
        resumption(run)
    print(caught.value)
    assert "no checkpoint can be resumed from:\n  - checkpoint-2: it is not marked as complete" in str(caught.value)
    assert f"touch {run.checkpoints / 'checkpoint-2' / 'COMPLETE'}" in caught.value.fix
    assert f"mv {run.checkpoints} ELSEWHERE" in caught.value.fix


def test_an_unfinished_first_checkpoint_of_an_older_version_is_reported_with_what_is_missing(run):
    """0.6.0 wrote no WRITING: what a kill cut off looks like a copy that lost its mark."""
    (saved(run, 2) / "COMPLETE").unlink()
    (run.checkpoints / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(RunError) as caught:
        resumption(run)
    print(caught.value)
    assert "checkpoint-2: it is not marked as complete (there is no COMPLETE, trainer_state.json)" in str(caught.value)
    assert f"or move them away, and the run starts over: mv {run.checkpoints} ELSEWHERE" in caught.value.fix
    assert "touch" not in caught.value.fix, "it cannot be resumed from"


@pytest.fixture(scope="module")
def cut(tiny_llama, rows, cache, tmp_path_factory) -> pathlib.Path:
    """A run that was stopped in its last step, with a checkpoint of step 2."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 3, recipe_for(tiny_llama, rows, out, *WORDS), Console(quiet=True), cache)
    return out


def test_every_flipped_bit_of_a_checkpoint_is_noticed(cut, tmp_path):
    """And of one by 0.5.1, which had no digests, none is a traceback."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(cut / "checkpoints" / "checkpoint-2", folder)
    files = sorted(file for file in folder.iterdir() if file.name != "COMPLETE")
    assert {file.name for file in files} == set(read_mark(folder)["files"])
    chance, unseen = random.Random(11), collections.Counter()
    for number in range(160):
        if number == 80:
            (folder / "COMPLETE").write_bytes(b"")
        file = files[number % len(files)]
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
        file.write_bytes(spoilt)
        wrong = faults_of(folder)
        assert wrong or number >= 80, f"a flipped bit of {file.name}"
        unseen[file.name] += not wrong
        file.write_bytes(content)
        assert faults_of(folder) == []
    assert unseen["optimizer.pt"] + unseen["rng_state.pth"] < 8, "torch's files hold checksums of their parts"


def test_a_stop_before_the_first_checkpoint_keeps_files_of_others(tiny_llama, rows, cache, tmp_path, monkeypatch):
    mine = tmp_path / "run" / "checkpoints" / "checkpoint-best" / "mine.txt"

    class Copied(Interrupt):
        def on_step_end(self, args, state, control, **kwargs):
            mine.parent.mkdir(exist_ok=True)
            mine.write_text("mine")

    told = stopped(monkeypatch, Copied(1), lambda console: train(
        recipe_for(tiny_llama, rows, tmp_path / "run", *WORDS), console=console, cache=cache,
    ))  # fmt: skip
    assert (
        f"{tmp_path / 'run'} stays, since it contains checkpoints/checkpoint-best, which is not part of the run" in told
    )
    assert mine.read_text() == "mine"
    shutil.rmtree(mine.parent)
    told = stopped(monkeypatch, Interrupt(1), lambda console: resume(tmp_path / "run", console=console, cache=cache))
    assert f"start it over with: nybble train --resume {tmp_path / 'run'}" in told
    assert (tmp_path / "run" / "start.json").exists(), "another process made this run"
    assert resume(tmp_path / "run", console=Console(quiet=True), cache=cache).adapter.is_dir()


def stopped(monkeypatch, callback, work) -> str:
    """What the terminal says when a callback stops a run."""

    class Interrupted(loop.QLoraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    console = Console(file=io.StringIO(), width=300)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "QLoraTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            work(console)
    print(console.file.getvalue())
    return console.file.getvalue()


END = {
    "steps": WORDS,
    "best": [*WORDS, "train.evaluate_every=1", "train.learning_rate=1", "train.warmup=0"],
    "last": [*WORDS, "train.keep_best=false", "train.save_every=3"],
    "blind": [*WORDS, "data.validation=0", "train.save_every=3"],
    "epoch": ["train.epochs=1", "train.evaluate_every=2", "train.samples=0", "train.micro_batch=8", "train.accumulation=2"],
    "epochs": ["train.epochs=2", "train.evaluate_every=4", "train.samples=0", "train.micro_batch=8", "train.accumulation=3"],
    "part": ["train.epochs=1.3", "train.keep_best=false", "train.samples=0", "train.micro_batch=8", "train.accumulation=2"],
    "packed": [*WORDS, "data.packing=true", "data.max_length=128", "train.micro_batch=1"],
    "packed epochs": ["train.epochs=2", "data.packing=true", "data.max_length=128", "train.micro_batch=2", "train.samples=0"],
    "16-bit": [*WORDS, "model.dtype=bfloat16", "model.quantization=none", "lora.dropout=0.1"],
    "8-bit": [*WORDS, "train.optimizer=adamw_8bit", "lora.dropout=0.1"],
    "patience": [*WORDS, "train.max_steps=9", "train.evaluate_every=1", "train.early_stopping=1", "train.learning_rate=1",
                 "train.warmup=0"],
}  # fmt: skip
PLACES = ("save_adapter", "summarise", "_load_best_model")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, marks=() if (name, place) == ("best", PLACES[0]) else pytest.mark.slow)
        for name in END
        for place in PLACES
        if place != "_load_best_model" or name in ("steps", "best", "epochs", "packed")
    ],
)
def test_a_run_killed_between_its_last_checkpoint_and_its_adapter_ends_with_the_same(
    name, place, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    """By words as by steps, the best kept or the last: not one step more is trained, and the summary counts both legs."""
    wholes = cache.parent / f"{cache.name}-wholes"
    if not (wholes / name).exists():
        train(recipe_for(tiny_llama, rows, wholes / name, *END[name]), console=quiet, cache=cache)
    whole = open_run(wholes / name)

    def kill(*words: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(QLoraTrainer if place.startswith("_") else training, place, kill)
        with pytest.raises(Killed):
            train(recipe_for(tiny_llama, rows, tmp_path / "cut", *END[name]), console=quiet, cache=cache)
    cut = open_run(tmp_path / "cut")
    spent = read_mark(cut.latest_checkpoint())["seconds"]
    assert spent > 0
    resume(cut.folder, console=quiet, cache=cache)
    assert read_metrics_but_time(cut) == read_metrics_but_time(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[key]) for key, tensor in adapter_of(cut).items())
    ends, wanted = (json.loads((one.folder / "summary.json").read_text()) for one in (cut, whole))
    for key in ("steps", "tokens", "train_loss", "kept_step", "validation_loss"):
        assert ends[key] == wanted[key]
    assert ends["seconds"] >= spent
    assert ends["tokens"] == sum(line.get("tokens", 0) for line in read_metrics_but_time(whole))


def test_the_best_checkpoint_is_verified_before_its_adapter_is_kept(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    """Damaged while the run went on; the run then resumes from before it, and ends as it would have."""
    load, words = QLoraTrainer._load_best_model, END["best"]

    def damaged(self) -> None:
        file = pathlib.Path(self.state.best_model_checkpoint) / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        load(self)

    with monkeypatch.context() as patch:
        patch.setattr(QLoraTrainer, "_load_best_model", damaged)
        with pytest.raises(RunError) as caught:
            train(
                recipe_for(tiny_llama, rows, tmp_path / "run", *words, "train.keep_checkpoints=4"),
                console=quiet,
                cache=cache,
            )
    print(caught.value)
    assert "whose validation loss is the best, was damaged while the run went on: adapter_model.safetensors" in str(
        caught.value
    )
    best = int(caught.value.what.split()[0].removeprefix("checkpoint-").rstrip(","))
    found = resumption(open_run(tmp_path / "run"))
    assert found.step < best if found.checkpoint else best == 1


def test_a_damaged_adapter_is_rebuilt_from_the_checkpoints(cut, cache, tmp_path, quiet):
    shutil.copytree(cut, tmp_path / "run")
    run = resume(tmp_path / "run", console=quiet, cache=cache)
    file = run.adapter / "adapter_model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-4] + b"\1\2\3\4")
    for place in (run.folder, run.adapter):
        with pytest.raises(RunError) as caught:
            open_run(place)
        print(caught.value)
        assert "the adapter is damaged: adapter_model.safetensors is not what was written" in caught.value.what
    with pytest.raises(RunError):
        check_adapter(run.adapter)
    run.adapter.rename(run.folder / "adapter-damaged")  # as the message says
    assert f"mv {run.adapter} {run.adapter}-damaged; nybble train --resume {run.folder}" in caught.value.fix
    again = resume(run.folder, console=quiet, cache=cache)
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == before


def test_training_does_not_continue_from_a_damaged_adapter(cut, tiny_llama, rows, cache, tmp_path, quiet):
    folder = tmp_path / "adapter"
    shutil.copytree(cut / "checkpoints" / "checkpoint-2", folder)
    (folder / "adapter_config.json").write_text("{}")
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", f"adapter={folder}", *WORDS)
    with pytest.raises(RunError, match=r"the adapter is damaged: adapter_config.json has 2 bytes") as caught:
        train(recipe, console=quiet, cache=cache)
    print(caught.value)
    assert not (tmp_path / "run").exists()
