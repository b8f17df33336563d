"""Sources, forms, duplicates, splits, packing and the cache of tokens."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nybble.data.batches import IGNORED, Collator, PackedRows
from nybble.data.packing import best_fit
from nybble.data.rows.sources import find_sources, read_rows
from nybble.data.sets.prepare import prepare
from nybble.data.text.fit import truncate
from nybble.data.text.tokens import Tokens
from nybble.errors import DataError
from nybble.objective.likelihood import summed_loss
from nybble.recipe import DataOptions
from tests.conftest import ROOT, SHARED

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]


def written(folder, name: str, text: str):
    file = folder / name
    file.write_text(text)
    return file


def loaded(file, tokenizer, cache, **options):
    return prepare(DataOptions(path=str(file), **{"validation": 0, **options}), tokenizer, 0, cache)


def test_every_kind_of_file_gives_the_same_rows_with_file_and_line(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    csv = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    files = {
        "a.jsonl": [1, 2, 3],
        "b.json": [2, 6, 10],
        "c.csv": [2, 3, 4],
        "d.parquet": ["row 1", "row 2", "row 3"],
        "e.jsonl.gz": [1, 2, 3],
        "f.json": [1, 2, 3],
    }
    written(tmp_path, "a.jsonl", lines)
    written(tmp_path, "b.json", json.dumps(ROWS, indent=2))
    written(tmp_path, "c.csv", csv)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    written(tmp_path, "f.json", lines)
    for name, places in files.items():
        rows = list(read_rows(find_sources(str(tmp_path / name))))
        assert [row.values for row in rows] == ROWS, name
        assert [row.origin for row in rows] == [f"{tmp_path / name}:{place}" for place in places]


def test_csv_fields_may_contain_line_breaks(tmp_path):
    file = written(tmp_path, "a.csv", 'prompt,completion\n"two\nlines",x\n\n\ny,z\n')
    assert [(row.values["prompt"], row.origin) for row in read_rows(find_sources(str(file)))] == [
        ("two\nlines", f"{file}:2"),
        ("y", f"{file}:6"),
    ], "blank lines are counted"


GOOD = '{"instruction": "a", "output": "b"}\n'


def test_many_bad_rows_are_counted_and_the_first_shown(tmp_path, tiny_tokenizer, cache):
    file = written(tmp_path, "a.jsonl", GOOD + '{"instruction": "a", "output": ""}\n' * 9)
    with pytest.raises(DataError) as caught:
        loaded(file, tiny_tokenizer, cache)
    print(caught.value)
    assert "9 of 10 rows cannot be trained on" in str(caught.value)
    assert f"{file}, lines 2 to 10: a row without an answer" in str(caught.value)
    file = written(tmp_path, "b.jsonl", GOOD + "".join(f'{{"instruction": "a", "{n}": ""}}\n' for n in range(29)))
    with pytest.raises(DataError, match="and 9 more"):
        loaded(file, tiny_tokenizer, cache)


def test_bad_rows_are_left_out_if_the_option_says_so(tmp_path, tiny_tokenizer, cache):
    file = written(tmp_path, "a.jsonl", GOOD + '{"instruction": "a", "output": ""}\n' + "{\n")
    data = loaded(file, tiny_tokenizer, cache, bad_rows="drop")
    assert (data.counts.faulty, data.counts.kept) == (2, 1)
    with pytest.raises(DataError, match="2 of 3 rows cannot be trained on") as caught:
        loaded(file, tiny_tokenizer, cache)
    assert "data.bad_rows=drop leaves them out" in caught.value.fix
    file = written(tmp_path, "b.jsonl", '{"instruction": "a", "output": ""}\n' + "{\n")
    with pytest.raises(DataError, match="2 of 2 rows cannot be trained on") as caught:
        loaded(file, tiny_tokenizer, cache)
    assert "bad_rows" not in caught.value.fix, "nothing would be left"
    file = written(tmp_path, "c.jsonl", '{"instruction": "a", "output": ""}\n')
    with pytest.raises(DataError, match="a row without an answer"):
        loaded(file, tiny_tokenizer, cache, bad_rows="drop")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        find_sources(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="contains no file that nybble reads"):
        find_sources(str(tmp_path))
    with pytest.raises(DataError, match="no file matches"):
        find_sources(str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match="no data was given"):
        find_sources("")


def test_columns_are_mapped_and_a_wrong_map_is_named(tmp_path, tiny_tokenizer, cache):
    file = written(tmp_path, "a.jsonl", '{"question": "red", "answer": "blue"}\n')
    data = loaded(file, tiny_tokenizer, cache, map={"prompt": "question", "completion": "answer"}, template="plain")
    assert data.counts.forms == {"prompt": 1}
    assert tiny_tokenizer.decode(data.train[0]["input_ids"]) == "<s>redblue</s>"
    with pytest.raises(DataError, match=r"no form has all fields that data\.map names: ask"):
        loaded(file, tiny_tokenizer, cache, map={"ask": "question"})


def test_a_column_that_is_mapped_and_in_no_row_is_named(tmp_path, tiny_tokenizer, cache):
    file = written(tmp_path, "a.jsonl", '{"q": "red", "a": "blue"}\n{"q": "red", "a": "pink", "s": "Be brief."}\n')
    mapping = {"prompt": "q", "completion": "a"}
    assert loaded(file, tiny_tokenizer, cache, map={**mapping, "system": "s"}).counts.missing_columns == []
    with pytest.raises(DataError, match=r"no row has 'sys', which data\.map names"):
        loaded(file, tiny_tokenizer, cache, map={**mapping, "system": "sys"})


def test_rows_over_length_are_refused_dropped_or_truncated(tmp_path, tiny_tokenizer, cache):
    rows = [{"prompt": "red", "completion": "one " * n} for n in (2, 40, 50)]
    file = written(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    length = {"max_length": 12, "template": "plain"}
    with pytest.raises(DataError) as caught:
        loaded(file, tiny_tokenizer, cache, **length)
    print(caught.value)
    assert "2 of 3 rows are longer than data.max_length=12" in str(caught.value)
    dropped = loaded(file, tiny_tokenizer, cache, **length, overlength="drop")
    assert (len(dropped.train), dropped.counts.overlength) == (1, 2)
    truncated = loaded(file, tiny_tokenizer, cache, **length, overlength="truncate")
    assert [len(ids) for ids in truncated.train["input_ids"]][1:] == [12, 12]
    assert all(row["input_ids"][-1] == 2 and row["trained"][-1] for row in truncated.train)
    with pytest.raises(DataError, match=r"all 3 rows are longer than data\.max_length=8"):
        loaded(file, tiny_tokenizer, cache, max_length=8, template="alpaca", overlength="drop")


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(2, 40))
def test_truncation_ends_with_a_trained_eos_or_gives_nothing(answers, length):
    ids, trained = [], []
    for count in answers:
        ids += [5, 6, 7, *[9] * count, 2]
        trained += [False] * 3 + [True] * (count + 1)
    if len(ids) <= length:
        return
    cut = truncate(Tokens(ids, trained), length, 2)
    if cut is not None:
        assert len(cut.ids) == len(cut.trained) <= length
        assert cut.ids[-1] == 2
        assert cut.trained[-1]
        assert sum(cut.trained) > 1, "an EOS alone is no answer"
    else:
        assert sum(trained[:length]) <= 1


def test_duplicates_go_before_the_split_and_the_split_is_fixed_by_the_seed(tmp_path, tiny_tokenizer, cache):
    lines = [json.dumps({"prompt": f"red {n}", "completion": "blue"}) for n in range(20)] * 2
    file = written(tmp_path, "a.jsonl", "\n".join(lines))
    options = DataOptions(path=str(file), validation=0.25)
    first, again = (prepare(options, tiny_tokenizer, 1, cache) for _ in range(2))
    other = prepare(options, tiny_tokenizer, 2, cache)
    assert (first.counts.duplicates, len(first.train), len(first.validation)) == (20, 15, 5)
    assert not set(first.train["origin"]) & set(first.validation["origin"])
    assert first.validation["origin"] == again.validation["origin"] != other.validation["origin"]
    with pytest.raises(DataError, match="leaves none to train on"):
        prepare(DataOptions(path=str(file), validation=20), tiny_tokenizer, 1, cache)


def test_the_cache_is_used_until_anything_that_matters_changes(rows, tiny_tokenizer, tmp_path):
    def key(**options):
        data = loaded(rows, tiny_tokenizer, tmp_path / "cache", **options)
        return data.cached, data.fingerprint

    first, second = key(), key()
    assert (first[0], second[0]) == (False, True)
    assert first[1] == second[1]
    changes = [{"max_length": 512}, {"template": "llama2"}, {"train_on": "all"}, {"overlength": "truncate"}]
    seen = {first[1], *(key(**change)[1] for change in changes)}
    assert len(seen) == 5
    text = rows.read_text()
    copy = written(tmp_path, "copy.jsonl", text.replace("say", "tell", 1))
    assert loaded(copy, tiny_tokenizer, tmp_path / "cache").fingerprint not in seen


def test_train_on_prompt_trains_everything_but_the_first_token(rows, tiny_tokenizer, cache):
    data = loaded(rows, tiny_tokenizer, cache, train_on="all")
    labels = Collator(0)([data.train[0]])["labels"]
    assert (labels == IGNORED).tolist()[0] == [True] + [False] * (labels.shape[1] - 1)


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(64, 128))
def test_packing_keeps_every_sample_once_and_fills_at_least_half(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    filled = [sum(lengths[n] for n in row) for row in rows]
    assert all(tokens <= capacity for tokens in filled)
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1, "two such rows would have been one"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data")
def test_packing_a_real_set_is_nearly_full(smollm2, cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    file = os.path.relpath(SHARED / "train" / "dolly_open_qa.jsonl", ROOT)
    data = loaded(file, tokenizer, cache, packing=True, max_length=2048)
    assert isinstance(data.train, PackedRows)
    assert data.counts.tokens / (2048 * len(data.train)) > 0.995


def test_packed_samples_do_not_see_each_other(rows, tiny_llama, tiny_tokenizer, cache):
    """The loss of packed rows is that of the same samples alone, so nothing leaks between them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    packed = loaded(rows, tiny_tokenizer, cache, packing=True, max_length=256)
    collate = Collator(tiny_tokenizer.pad_token_id or 0)

    def total(batch):
        with torch.no_grad():
            return summed_loss(model, batch)

    together = total(collate([packed.train[0], packed.train[1]]))
    samples = [sample for row in (packed.train[0], packed.train[1]) for sample in row]
    alone = sum(total(collate([sample])) for sample in samples)
    assert len(samples) >= 4
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_the_loss_is_transformers_own_although_prompts_take_no_logits(rows, tiny_llama, tiny_tokenizer, cache):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    data = loaded(rows, tiny_tokenizer, cache)
    batch = Collator(0)([data.train[n] for n in (0, 7, 33)])
    assert len(batch["predicting"]) < 0.5 * batch["labels"].numel()
    total, count = summed_loss(model, batch), len(batch["predicting"])
    own = model(**{name: value for name, value in batch.items() if name != "predicting"}).loss
    torch.testing.assert_close(total / count, own)


def test_batches_pad_on_the_right_and_labels_ignore_the_pad_not_its_id(tiny_tokenizer):
    samples = [
        {"input_ids": [1, 5, 0, 2], "trained": [False, False, True, True]},
        {"input_ids": [1, 2], "trained": [False, True]},
    ]
    batch = Collator(0)(samples)
    assert batch["input_ids"].tolist() == [[1, 5, 0, 2], [1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 0, 2], [-100, 2, -100, -100]], (
        "a trained token may be the pad's id"
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_half_a_surrogate_pair_is_named(tmp_path, tiny_tokenizer, cache):
    file = written(tmp_path, "a.jsonl", '{"prompt": "red \\ud83d", "completion": "blue"}\n')
    with pytest.raises(DataError) as caught:
        loaded(file, tiny_tokenizer, cache)
    print(caught.value)
    assert "'prompt' contains half a surrogate pair" in str(caught.value)
    assert caught.value.where == f"{file}:1"


def test_a_run_knows_its_data_again_unless_rows_are_read_that_were_left_out(
    tmp_path, tiny_tokenizer, cache, monkeypatch
):
    """start.json holds the fingerprint: the cache may change its format, while a bad row that is now read is a change."""
    plain = loaded(written(tmp_path, "a.jsonl", GOOD), tiny_tokenizer, cache).fingerprint
    monkeypatch.setattr("nybble.data.sets.examine.CACHE_VERSION", 0)
    again = loaded(tmp_path / "a.jsonl", tiny_tokenizer, cache)
    assert (again.fingerprint, again.cached) == (plain, False)
    numbers = written(tmp_path, "b.jsonl", GOOD + '{"instruction": "a", "output": 4}\n')
    first = loaded(numbers, tiny_tokenizer, cache)
    assert first.counts.notices
    kept = loaded(numbers, tiny_tokenizer, cache)
    assert kept.cached
    assert kept.fingerprint == first.fingerprint
    assert kept.counts.notices == first.counts.notices, "told again from the cache"
