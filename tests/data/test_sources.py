"""Several sources: folders, patterns, weights, streams; and the order in which rows are trained on."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections import Counter

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nybble.data.batches import Collator, FilledRows, PackedRows
from nybble.data.order import GroupedByLength, lengths_of
from nybble.data.rows.sources import find_sources, read_rows
from nybble.data.sets.prepare import prepare, weighted
from nybble.data.sets.stream import StreamedRows
from nybble.errors import DataError, RecipeError
from nybble.recipe import DataOptions, load_recipe
from nybble.run.log import read_metrics
from nybble.training.train import resume, train


def write(file, count: int, word: str):
    file.write_text(
        "".join(json.dumps({"prompt": f"{word} {n}", "completion": "red " * (n % 7 + 1)}) + "\n" for n in range(count))
    )
    return file


def prepared(path, tokenizer, cache, **options):
    return prepare(DataOptions(path=path, **{"validation": 0, **options}), tokenizer, 0, cache)


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path, tiny_tokenizer, cache):
    (tmp_path / "more").mkdir()
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl"):
        write(tmp_path / name, 3, name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", "._b.jsonl"):
        write(tmp_path / name, 3, "hidden")
    (whole,) = find_sources(str(tmp_path))
    assert [file.name for file in whole.files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    (some,) = find_sources(str(tmp_path / "[ab].*"))
    assert [file.name for file in some.files] == ["a.jsonl", "b.jsonl"]
    data = prepared([str(tmp_path / "b.jsonl"), str(tmp_path / "more")], tiny_tokenizer, cache)
    assert [origin.split("/")[-1] for origin in data.train["origin"]] == [
        f"{n}.jsonl:{k}" for n in "bc" for k in (1, 2, 3)
    ]
    assert data.train["source"] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_refused_with_the_command_that_converts_it(tmp_path, splits):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    (DatasetDict(train=rows) if splits else rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="written by Datasets' save_to_disk") as caught:
        find_sources(str(tmp_path / "saved"))
    print(caught.value)
    command = caught.value.fix.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    (row,) = read_rows(find_sources(str(tmp_path / "saved.parquet")))
    assert row.values == {"prompt": "a", "completion": "b"}


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0.1, 4)), min_size=1, max_size=4))
def test_a_weight_is_how_often_each_row_of_a_source_is_used(shape):
    sources = numpy.repeat(range(len(shape)), [count for count, _ in shape])
    used = Counter(weighted(sources, [weight for _, weight in shape], seed=1).tolist())
    for source, (count, weight) in enumerate(shape):
        own = [used[place] for place in numpy.flatnonzero(sources == source).tolist()]
        assert all(times in (int(weight), int(weight) + 1) for times in own)
        assert sum(own) == int(weight) * count + round(weight % 1 * count)


def test_sources_are_mixed_by_weight_and_the_validation_rows_are_not_repeated(tmp_path, tiny_tokenizer, cache):
    path = {str(write(tmp_path / "a.jsonl", 40, "a")): 2, str(write(tmp_path / "b.jsonl", 40, "b")): 0.5}
    data = prepared(path, tiny_tokenizer, cache, validation=8)
    used = Counter(data.train["origin"])
    assert not used.keys() & set(data.validation["origin"])
    assert {used[origin] for origin in used if "a.jsonl" in origin} == {2}
    assert {used[origin] for origin in used if "b.jsonl" in origin} == {1}
    assert data.train_samples == 72
    with pytest.raises(RecipeError, match="weights must be above 0"):
        load_recipe(None, ["data.path={a.jsonl: 0}"])


def test_a_stream_mixes_shuffles_and_repeats_and_depends_on_the_seed_alone(tmp_path, tiny_tokenizer, cache):
    path = {str(write(tmp_path / "a.jsonl", 40, "a")): 3, str(write(tmp_path / "b.jsonl", 400, "b")): 1}
    data = prepared(path, tiny_tokenizer, cache, streaming=True, validation=10)
    assert isinstance(data.train, StreamedRows)
    assert data.rows is None
    first, again = (list(itertools.islice(data.train, 2500)) for _ in range(2))
    assert first == again
    of_a = sum("a.jsonl" in sample["origin"] for sample in first)
    assert 0.7 < of_a / 2500 < 0.8, "three of four rows are from the source of weight 3, over and over"
    assert not {sample["origin"] for sample in first} & set(data.validation["origin"])
    packed = prepared(path, tiny_tokenizer, cache, streaming=True, packing=True, max_length=128)
    rows = list(itertools.islice(packed.train, 50))
    assert all(sum(len(sample["input_ids"]) for sample in row) <= 128 for row in rows)
    assert sum(len(sample["input_ids"]) for row in rows for sample in row) > 0.95 * 50 * 128
    Collator(0)(rows[:4])


def test_a_bad_row_far_into_a_stream_is_left_out_and_named(tmp_path, tiny_tokenizer, cache, caplog, monkeypatch):
    monkeypatch.setattr("nybble.data.rows.reading.STREAM_HEAD", 20)
    file = write(tmp_path / "a.jsonl", 40, "a")
    with file.open("a") as stream:
        stream.write('{"prompt": "x"\n{"prompt": "x", "completion": ""}\n')
    data = prepared(str(file), tiny_tokenizer, cache, streaming=True)
    with caplog.at_level(logging.WARNING):
        samples = list(itertools.islice(data.train, 1000))
    assert len({sample["origin"] for sample in samples}) == 40
    assert f"{file}:41" in caplog.text
    assert f"{file}:42" in caplog.text
    assert len(caplog.records) == 2, "each is named once, however often the stream comes round"
    with pytest.raises(DataError, match="2 of 42 rows cannot be trained on"):
        prepared(str(file), tiny_tokenizer, cache)


@pytest.mark.parametrize("packing", [False, True])
def test_training_on_a_stream_resumes_where_it_stopped(tiny_llama, tmp_path, cache, quiet, packing, monkeypatch):
    file = write(tmp_path / "a.jsonl", 60, "red")
    words = [
        f"model.path={tiny_llama}",
        f"data.path={file}",
        "model.device=cpu",
        "model.dtype=float32",
        "data.streaming=true",
    ]
    words += ["data.max_length=128", "data.validation=8", f"data.packing={packing}", "train.max_steps=6"]
    words += ["train.micro_batch=2", "train.accumulation=2", "train.evaluate_every=2", "train.samples=0"]
    whole = train(load_recipe(None, [*words, f"out={tmp_path / 'whole'}"]), console=quiet, cache=cache)
    from tests.training.test_train import interrupted

    recipe = load_recipe(None, [*words, f"out={tmp_path / 'cut'}"])
    interrupted(monkeypatch, 3, recipe, quiet, cache)
    cut = resume(tmp_path / "cut", console=quiet, cache=cache)
    losses = [[line.loss for line in read_metrics(run) if line.loss is not None] for run in (whole, cut)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.validation=0"], "set train.max_steps"),
        (["train.max_steps=2"], "cannot hold out a share of a stream"),
        (["train.max_steps=2", "data.validation=0", "data.limit=5"], "does not apply to a stream"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(words, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["data.streaming=true", *words])
    print(caught.value)
    assert message in str(caught.value)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 5))
def test_every_row_comes_once_an_epoch_and_the_largest_steps_first(lengths, step, epoch):
    order = GroupedByLength(numpy.array(lengths), step, seed=3)
    order.set_epoch(epoch)
    places = list(order)
    assert sorted(places) == list(range(len(lengths)))
    whole = len(lengths) // step * step
    if whole:
        steps = numpy.array(lengths)[places[:whole]].reshape(-1, step)
        assert steps[0].sum() == steps.sum(axis=1).max(), "the first has the most tokens"
        assert steps[:2].max() == steps.max(), "and one of the first two the longest row"
    assert places == list(order)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_the_last_step_is_filled_for_several_processes(count, micro_batch, accumulation, processes, epoch):
    """Every process gets whole micro batches, and the rows that count are those of a single process, step by step."""
    together = micro_batch * processes
    step, lengths = together * accumulation, numpy.arange(count) % 7 + 1
    alone, filled = GroupedByLength(lengths, step, seed=1), GroupedByLength(lengths, step, 1, together)
    for order in (alone, filled):
        order.set_epoch(epoch)
    places = list(filled)
    assert len(places) == len(filled)
    assert len(places) % together == 0
    assert places[:count] == list(alone)
    last = set(places[count // step * step : count])
    assert {place - count for place in places[count:]} <= last, "the last step's own rows, of which none counts"


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_fill_a_step_train_nothing(packing, rows, tiny_tokenizer, cache):
    data = prepared(str(rows), tiny_tokenizer, cache, packing=packing)
    filled, count = FilledRows(data.train), len(data.train)
    assert len(filled) == count
    assert filled[1] == data.train[1]
    collate = Collator(tiny_tokenizer.pad_token_id or 0, flatten=not packing)
    real, repeated, both = (collate([filled[place] for place in places]) for places in ((0,), (count,), (0, count + 1)))
    assert torch.equal(repeated["input_ids"], real["input_ids"])
    assert len(real["predicting"]) > 0
    assert len(repeated["predicting"]) == 0
    assert len(both["predicting"]) == len(real["predicting"])


def test_rows_of_similar_length_share_a_step_and_epochs_differ(rows, tiny_tokenizer, cache):
    data = prepared(str(rows), tiny_tokenizer, cache)
    lengths = lengths_of(data.train)
    order = GroupedByLength(lengths, 8, seed=1)
    first = list(order)

    def padding(places: list[int]) -> int:
        steps = numpy.array(places).reshape(-1, 8)
        return int((lengths[steps].max(axis=1, keepdims=True) - lengths[steps]).sum())

    assert padding(first) < 0.3 * padding(numpy.random.default_rng(0).permutation(len(lengths)).tolist())
    order.set_epoch(1)
    assert list(order) != first
    packed = prepared(str(rows), tiny_tokenizer, cache, packing=True)
    assert isinstance(packed.train, PackedRows)
    assert lengths_of(packed.train).tolist() == [sum(len(s["input_ids"]) for s in row) for row in packed.train]


def test_a_run_of_several_epochs_resumes_in_the_middle_of_one(tiny_llama, rows, tmp_path, cache, quiet, monkeypatch):
    from tests.training.test_train import interrupted, read_metrics_but_time

    words = [
        f"model.path={tiny_llama}",
        f"data.path={rows}",
        "model.device=cpu",
        "model.dtype=float32",
        "data.max_length=256",
    ]
    words += ["data.limit=24", "data.validation=4", "train.epochs=3", "train.micro_batch=2", "train.accumulation=2"]
    words += ["train.evaluate_every=4", "train.samples=0"]
    whole = train(load_recipe(None, [*words, f"out={tmp_path / 'whole'}"]), console=Console(quiet=True), cache=cache)
    interrupted(monkeypatch, 10, load_recipe(None, [*words, f"out={tmp_path / 'cut'}"]), quiet, cache)
    cut = resume(tmp_path / "cut", console=quiet, cache=cache)
    assert read_metrics_but_time(cut) == read_metrics_but_time(whole)
