"""What is held out for validation: whole rows of the file, whatever became of them."""

from __future__ import annotations

import json

import numpy
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from nybble.data.sets.prepare import prepare, split
from nybble.recipe import load_recipe
from tests.conftest import small_tokenizer


@given(sizes=st.lists(st.integers(1, 4), min_size=5, max_size=30), share=st.floats(0.01, 0.4), seed=st.integers(0, 99))
def test_rows_of_one_origin_stay_together(sizes, share, seed):
    rows = Dataset.from_dict({"origin": [str(number) for number, size in enumerate(sizes) for _ in range(size)]})
    train, held_out = split(rows, share, seed)
    assert not set(train["origin"][:]) & set(held_out["origin"][:])
    assert len(train) + len(held_out) == len(rows)
    wanted = max(1, round(share * len(rows)))
    assert wanted <= len(held_out) < wanted + max(sizes)


@given(count=st.integers(2, 50), held_out=st.integers(1, 49), seed=st.integers(0, 99))
def test_rows_of_their_own_are_split_as_ever(count, held_out, seed):
    """The split of runs that were started with an earlier version."""
    held_out = min(held_out, count - 1)
    rows = Dataset.from_dict({"origin": [f"rows.jsonl:{number}" for number in range(count)]})
    order = numpy.random.default_rng(seed).permutation(count)
    train, validation = split(rows, held_out, seed)
    assert validation["origin"][:] == [f"rows.jsonl:{number}" for number in sorted(order[:held_out])]
    assert len(train) == count - held_out


def test_both_answers_of_a_pair_are_on_one_side(tmp_path):
    """KTO reads a pair as a good and a bad answer to the same prompt."""
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(40)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = load_recipe(None, ["model.path=m", f"data.path={file}", "data.template=plain", "data.validation=0.25"])
    data = prepare(recipe.data, small_tokenizer(), 0, tmp_path / "cache", target="labels")
    sides = [rows["origin"][:] for rows in (data.train, data.validation)]
    assert [len(side) for side in sides] == [60, 20]
    assert not set(sides[0]) & set(sides[1])
