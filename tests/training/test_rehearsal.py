"""What a run tries after its first step: it finds what would fail later, and changes nothing."""

from __future__ import annotations

import errno
import random

import numpy
import pytest
import torch

import nybble.training.rehearsal as rehearsal
from nybble.errors import StorageError
from nybble.run.folder import Run, open_run
from nybble.training.checkpoints import TRIED, remove_unfinished
from nybble.training.rehearsal import Rehearsal
from nybble.training.train import resume, train
from nybble.training.trainer import QLoraTrainer
from tests.training.test_train import UNASKED, adapter_of, interrupted, read_metrics_but_time, recipe_for

LATER = ["train.max_steps=6", "train.evaluate_every=3", "lora.dropout=0.2", "train.neftune_alpha=5", UNASKED]
"""The first evaluation and the first checkpoint after a step come two steps later."""


def random_states() -> list[object]:
    kind, keys, *others = numpy.random.get_state()
    return [random.getstate(), kind, keys.tolist(), *others, torch.get_rng_state().tolist()]


@pytest.fixture
def tried(monkeypatch) -> list[str]:
    """What was tried, in order; trying it must leave all random states as they were."""
    seen: list[str] = []

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*given):
            before = random_states()
            original(*given)
            assert random_states() == before
            seen.append(name)

        monkeypatch.setattr(owner, name, call)

    watched(QLoraTrainer, "try_evaluation")
    watched(rehearsal, "try_save")
    return seen


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_run_is_the_same_with_and_without_the_trial(
    optimizer, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch, tried
):
    words = [*LATER, f"train.optimizer={optimizer}"]
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=quiet, cache=cache)
    assert tried == ["try_evaluation", "try_save"], "each once"
    monkeypatch.setattr(Rehearsal, "on_step_begin", lambda *given, **more: None)
    without = train(recipe_for(tiny_llama, rows, tmp_path / "without", *words), console=quiet, cache=cache)
    assert read_metrics_but_time(run) == read_metrics_but_time(without)
    assert all(torch.equal(tensor, adapter_of(without)[name]) for name, tensor in adapter_of(run).items())
    names = [sorted(path.relative_to(one.folder) for path in one.folder.rglob("*")) for one in (run, without)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.evaluate_every=1"], []),
        (["train.max_steps=1"], []),
        (["train.keep_best=false", "train.evaluate_every=1", "train.save_every=3"], ["try_save"]),
        (["train.keep_best=false", "train.save_every=1"], ["try_evaluation"]),
        (["data.validation=0"], ["try_save"]),
    ],
    ids=["both follow", "one step", "evaluated", "saved", "no rows"],
)
def test_only_what_did_not_follow_the_first_step_is_tried(
    words, expected, tiny_llama, rows, cache, tmp_path, quiet, tried
):
    steps = ["train.max_steps=3", "train.evaluate_every=3", UNASKED]
    train(recipe_for(tiny_llama, rows, tmp_path / "run", *steps, *words), console=quiet, cache=cache)
    assert tried == expected


def test_a_resumed_run_tries_again_and_ends_the_same(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch, tried):
    whole = train(recipe_for(tiny_llama, rows, tmp_path / "whole", *LATER), console=quiet, cache=cache)
    interrupted(monkeypatch, 4, recipe_for(tiny_llama, rows, tmp_path / "cut", *LATER), quiet, cache)
    tried.clear()
    resume(tmp_path / "cut", console=quiet, cache=cache)
    assert tried == ["try_evaluation", "try_save"]
    cut = open_run(tmp_path / "cut")
    assert read_metrics_but_time(cut) == read_metrics_but_time(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(cut).items())


def test_the_longest_validation_batch_is_tried(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    batches: dict[str, list[int]] = {"tried": [], "evaluated": []}
    measured, evaluation = QLoraTrainer._measured, QLoraTrainer.evaluation_loop
    where = ["tried"]

    def watched(self, batch):
        batches[where[0]].append(batch["input_ids"].numel())
        return measured(self, batch)

    def evaluated(self, *given, **more):
        where[0] = "evaluated"
        output = evaluation(self, *given, **more)
        where[0] = "tried"
        return output

    monkeypatch.setattr(QLoraTrainer, "_measured", watched)
    monkeypatch.setattr(QLoraTrainer, "evaluation_loop", evaluated)
    words = [*LATER, "data.max_length=112", "train.micro_batch=1", "data.validation=20"]
    train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=quiet, cache=cache)
    print(batches)
    assert len(set(batches["evaluated"])) > 1
    assert batches["tried"] == [max(batches["evaluated"])]


def test_a_disk_that_is_full_is_found_after_the_first_step(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    steps = []
    clear = QLoraTrainer.training_step
    monkeypatch.setattr(QLoraTrainer, "training_step", lambda *given: steps.append(1) or clear(*given))
    monkeypatch.setattr(rehearsal.torch, "save", full)
    with pytest.raises(StorageError) as caught:
        train(
            recipe_for(tiny_llama, rows, tmp_path / "run", *LATER, "train.accumulation=1"), console=quiet, cache=cache
        )
    print(caught.value)
    assert "the disk is full" in str(caught.value)
    assert len(steps) == 1
    assert not (tmp_path / "run").exists()


def test_what_a_killed_trial_left_is_removed(tmp_path):
    run = Run(tmp_path, None)
    (run.checkpoints / TRIED).mkdir(parents=True)
    (run.checkpoints / TRIED / "optimizer.pt").write_bytes(b"half")
    remove_unfinished(run)
    assert not list(run.checkpoints.iterdir())
