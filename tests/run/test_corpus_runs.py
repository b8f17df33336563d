"""Every damaged run ends as it must: an older whole checkpoint is taken, or one sentence says what is wrong with which file."""

from __future__ import annotations

import json
import pathlib
import shutil
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from nybble.errors import NybbleError
from nybble.files.digests import describe
from nybble.run.folder import Run, open_run
from nybble.training.checkpoints import resumption
from nybble.training.train import train
from tests.corpus.cases import Outcome, held, nybble, sampled
from tests.corpus.runs import CASES, RunCase, exchanged
from tests.training.test_train import interrupted, recipe_for

WORDS = [
    "train.max_steps=4",
    "train.evaluate_every=1",
    "train.keep_checkpoints=3",
    "train.samples=0",
    "train.micro_batch=8",
]
WORDS += [
    "train.accumulation=1",
    "train.learning_rate=0.02",
    "train.warmup=0",
    "lora.dropout=0.1",
    "train.scheduler=constant",
    "train.seed=5",
]
REAL = ("bit-optimizer.pt", "no-scheduler.pt", "mark-lost", "foreign-folders", "best-damaged", "file-of-that-name")
REAL += ("0.5.1-no-rng", "none-at-all")


@dataclass(frozen=True)
class Runs:
    whole: Run
    cut: pathlib.Path
    cache: pathlib.Path


@pytest.fixture(scope="module")
def runs(tiny_llama, rows, cache, tmp_path_factory) -> Runs:
    """One run that finished, and the same, stopped in its fourth step."""
    folder, quiet = tmp_path_factory.mktemp("corpus"), Console(quiet=True)
    whole = train(recipe_for(tiny_llama, rows, folder / "whole", *WORDS), console=quiet, cache=cache)
    (whole.folder / "evaluation.json").write_text(json.dumps({"date": "2026-11-27", "tasks": [], "held_out": None}))
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, 3, recipe_for(tiny_llama, rows, folder / "cut", *WORDS), quiet, cache)
    state = json.loads((folder / "cut" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2, "the cases rest on it"
    return Runs(whole, folder / "cut", cache)


def test_there_are_enough_of_them():
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", sampled(CASES, every=12))
def test_a_damaged_run_is_reported_in_one_sentence(case: RunCase, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.cut if case.command == "resume" else runs.whole.folder, folder)
    case.make(folder)
    before = kept(folder)
    if case.command == "resume":
        held(case, found(folder))
    else:
        held(case, nybble(*command(case.command, folder), cache=runs.cache))
    if case.status or case.command == "resume":
        assert kept(folder) == before, "something was changed"


def test_a_run_is_not_resumed_with_another_template(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.cut, folder)
    exchanged(b"ent", b"tne")(folder / "template.json")
    before = kept(folder)
    outcome = nybble("train", "--resume", folder, cache=runs.cache)
    print(outcome.text)
    assert outcome.status == 1
    assert "the run is damaged: template.json is not what was written" in " ".join(outcome.text.split())
    assert kept(folder) == before


def kept(folder: pathlib.Path) -> dict:
    """All that a folder holds, by path; the caches of evaluations that were begun lie elsewhere."""
    return {**describe(folder), **{str(path): "folder" for path in folder.rglob("*") if path.is_dir()}}


def command(name: str, run: pathlib.Path) -> list[object]:
    return {
        "chat": ["chat", run, "--prompt", "say red", "--max-new-tokens", 1],
        "eval": ["eval", run, "--tasks", "none", "--answers", 1],
        "export": ["export", run, "--to", "adapter"],
    }[name]


def found(folder: pathlib.Path) -> Outcome:
    """Where a run goes on, without going on."""
    try:
        resumed = resumption(open_run(folder))
    except NybbleError as error:
        return Outcome(error.exit_code, str(error))
    told = "".join(f"{place.name}: {wrong}\n" for place, wrong in resumed.skipped.items())
    return Outcome(0, f"{told}resuming from {resumed.checkpoint.name if resumed.checkpoint else 'the beginning'}")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if place == 0 else pytest.mark.slow) for place, name in enumerate(REAL)]
)
def test_a_run_resumed_after_damage_ends_like_an_undamaged_one(name, runs, tmp_path):
    """By the command line; and nothing that was damaged or not the run's is lost."""
    case = next(case for case in CASES if case.name == f"checkpoint-{name}")
    folder = tmp_path / "run"
    shutil.copytree(runs.cut, folder)
    case.make(folder)
    resumed = resumption(open_run(folder))
    before = {place.name: describe(place) for place in resumed.skipped}
    others = {"checkpoint-best", "checkpoint-foo", "checkpoint-3-old", "checkpoint-03"}
    foreign = {place.name: describe(place) for place in (folder / "checkpoints").glob("*") if place.name in others}
    outcome = nybble("train", "--resume", folder, cache=runs.cache)
    held(case, outcome)
    assert {place: describe(folder / "checkpoints" / f"set-aside-{place}") for place in before} == before
    assert {place: describe(folder / "checkpoints" / place) for place in foreign} == foreign
    saved, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, runs.whole.folder))
    assert all(torch.equal(saved[key], tensor) for key, tensor in wanted.items())
    summary, whole = (json.loads((run / "summary.json").read_text()) for run in (folder, runs.whole.folder))
    assert [summary[key] for key in ("tokens", "steps", "kept_step", "validation_loss", "train_loss")] == [
        whole[key] for key in ("tokens", "steps", "kept_step", "validation_loss", "train_loss")
    ]
