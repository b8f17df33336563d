"""What `nybble data check` looks at is what `nybble train` trains on: rows, order, batches and steps."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from nybble.data.batches import Collator
from nybble.data.order import GroupedByLength, lengths_of
from nybble.errors import DataError
from nybble.preflight import data_check, preparation
from nybble.preflight.preparation import Preparation, prepare_run
from nybble.recipe import Recipe, load_recipe
from nybble.training import preparation as of_training
from nybble.training.train import train


@pytest.fixture
def prepared(monkeypatch) -> list[Preparation]:
    """Everything that check and train were given by the one function that prepares."""
    made: list[Preparation] = []

    def watched(*args, **kwargs) -> Preparation:
        made.append(prepare_run(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(data_check, "prepare_run", watched)
    monkeypatch.setattr(of_training, "prepare_run", watched)
    return made


def recipe_of(model, rows, *words: str) -> Recipe:
    return load_recipe(
        None,
        [f"model.path={model}", f"data.path={rows}", "model.device=cpu", "data.max_length=128", "train.max_steps=1",
         "train.micro_batch=2", "train.accumulation=1", "train.samples=0", *words],
    )  # fmt: skip


def batches(found: Preparation, recipe: Recipe) -> list[dict]:
    """The first batches, in the order of training."""
    rows = found.data.train
    collate = Collator(0, recipe.engine.fused)
    order = list(GroupedByLength(lengths_of(rows), 2, recipe.train.seed))
    return [collate([rows[n] for n in order[start:][:2]]) for start in range(0, min(len(order), 12), 2)]


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("validation", ["0.1", "0", "held.jsonl"])
def test_check_and_train_see_the_same(packing, validation, rows, tiny_llama, tmp_path, prepared, monkeypatch):
    (tmp_path / "held.jsonl").write_text('{"instruction": "say red", "output": "red"}\n' * 2)
    if validation.endswith("jsonl"):
        validation = str(tmp_path / validation)
    recipe = recipe_of(
        tiny_llama, rows, f"data.packing={packing}", f"data.validation={validation}", f"out={tmp_path / 'run'}"
    )
    console, cache = Console(file=io.StringIO(), width=120), tmp_path / "cache"
    assert data_check.check(recipe, console, cache=cache)
    run = train(recipe, console=Console(quiet=True), cache=cache)
    checked, trained = prepared
    assert trained.examined.cached
    assert checked.data.fingerprint == trained.data.fingerprint == run.start().data
    assert checked.schedule == trained.schedule
    assert checked.examined.counts == trained.examined.counts
    for name in ("sample", "validation"):
        ours, theirs = getattr(checked.data, name), getattr(trained.data, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or [ours[n] for n in range(len(ours))] == [theirs[n] for n in range(len(theirs))]
    for ours, theirs in zip(batches(checked, recipe), batches(trained, recipe), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key
    said = console.file.getvalue()
    assert f"{checked.examined.counts.tokens:,}, {checked.examined.counts.trained_tokens:,} of them trained" in said
    assert f"{trained.schedule.steps} step of 2 rows" in said


@pytest.mark.parametrize(
    ("word", "content"),
    [
        ("data.max_length=600", None),
        ("train.micro_batch=100", None),
        ("data.validation=80", None),
        ("data.validation=missing.jsonl", None),
        ("data.template=plain", '{"instruction": "a", "output": ""}\n'),
        ("data.max_length=16", '{"instruction": "one two three", "output": "one two three four five six"}\n'),
        ("train.max_steps=10 train.save_every=3", None),
    ],
)  # fmt: skip
def test_train_stops_at_the_first_fault_that_check_lists(word, content, rows, tiny_llama, tmp_path):
    file = rows
    if content is not None:
        file = tmp_path / "a.jsonl"
        file.write_text(content + rows.read_text())
    recipe = recipe_of(tiny_llama, file, *word.split())
    tokenizer, config = data_check.load_tokenizer_and_config(recipe)
    faults = []
    prepare_run(recipe, tokenizer, config, tmp_path / "cache", on_fault=faults.append)
    assert faults
    with pytest.raises(type(faults[0])) as caught:
        prepare_run(recipe, tokenizer, config, tmp_path / "cache")
    assert str(caught.value) == str(faults[0])


def test_a_preparation_that_refuses_nothing_is_whole(rows, tiny_llama, tmp_path):
    seen: list[tuple[str, int]] = []
    recipe = recipe_of(tiny_llama, rows)
    tokenizer = data_check.load_tokenizer_and_config(recipe)[0]
    found = prepare_run(recipe, tokenizer, None, tmp_path, progress=lambda stage, count: seen.append((stage, count)))
    assert found.data is not None
    assert found.schedule.steps == 1
    assert found.held_out is None
    assert {stage for stage, _ in seen} == {"reading", "checking"}
    assert max(count for stage, count in seen if stage == "reading") == 80


def test_rows_that_the_x_ray_refuses_are_not_given_out(rows, tiny_llama, tmp_path, monkeypatch):
    def damaged(*_args) -> None:
        raise DataError("these rows would not be trained as they should be")

    monkeypatch.setattr(preparation, "inspect", damaged)
    faults = []
    recipe = recipe_of(tiny_llama, rows)
    found = prepare_run(recipe, data_check.load_tokenizer_and_config(recipe)[0], None, tmp_path, on_fault=faults.append)
    assert (found.data, found.schedule, len(faults)) == (None, None, 1)
    assert found.examined.counts.kept == 80
