"""Ranges and lists among key=value arguments: what they mean, and how wrong ones are refused before anything is loaded."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import RecipeError
from nybble.sweep.request import sweep_request
from nybble.sweep.space import Choices, Range, combinations, read_space

BASE = ["model.path=m", "data.path=d.jsonl"]


def space(*words: str):
    return read_space([*BASE, *words]).space


def test_ranges_and_lists():
    assert space("train.learning_rate=1e-4..1e-3") == {"train.learning_rate": Range(1e-4, 1e-3, True, False)}
    assert space("train.learning_rate=1e-4..2e-4")["train.learning_rate"].is_log, (
        "a rate is always searched by its logarithm"
    )
    assert space("lora.dropout=0..0.1") == {"lora.dropout": Range(0, 0.1, False, False)}
    assert space("lora.r=8..64") == {"lora.r": Range(8, 64, False, True)}
    assert space("lora.r=4..64") == {"lora.r": Range(4, 64, True, True)}
    assert space("lora.r=8,16,32") == {"lora.r": Choices(("8", "16", "32"))}
    assert space("lora.rslora=true,false") == {"lora.rslora": Choices(("true", "false"))}
    assert space("lora.targets=q_proj,v_proj") == {}, "one value of an option that takes several"
    assert space("lora.targets=[q_proj,v_proj],all-linear") == {
        "lora.targets": Choices(("[q_proj,v_proj]", "all-linear"))
    }
    assert list(space("lora.r=8,16", "train.epochs=2", "lora.alpha=8..32")) == ["lora.r", "lora.alpha"]


@given(low=st.floats(1e-6, 1e-1), ratio=st.floats(1.5, 1e4))
def test_what_is_drawn_from_a_range_is_a_value_that_the_recipe_takes(low, ratio):
    searched = read_space([*BASE, f"train.learning_rate={low!r}..{low * ratio!r}"])
    each = searched.space["train.learning_rate"]
    for value in (each.low, math.sqrt(each.low * each.high), each.high):
        rate = searched.recipe({"train.learning_rate": each.text(value)}).train.learning_rate
        assert rate == pytest.approx(value, rel=1e-2)


def test_the_recipes_own_values_are_tried_first_where_they_lie_in_the_space():
    assert read_space([*BASE, "train.learning_rate=1e-4..1e-3", "lora.r=4,8", "lora.alpha=32,64"]).own == {
        "train.learning_rate": "0.0002", "lora.alpha": "32",
    }  # fmt: skip


def test_a_number_is_found_among_choices_however_it_is_written():
    asked = [*BASE, "train.learning_rate=0.001", "lora.rslora=1,true"]
    assert read_space([*asked, "train.learning_rate=1e-4,1e-3"]).own == {"train.learning_rate": "1e-3"}


def test_combinations_of_a_finite_space():
    assert len(combinations(space("lora.r=8,16,32", "train.warmup=0,0.1"))) == 6
    assert len(combinations(space("lora.r=8..10"))) == 3
    assert combinations(space("lora.r=8,16", "train.learning_rate=1e-4..1e-3")) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["train.learning_rate=1e-3..1e-4"],
            "empty range.*lower end comes first\n  fix:   train.learning_rate=0.0001..0.001",
        ),
        (["train.learning_rate=0..1e-3"], "train.learning_rate: should be above 0, not 0"),
        (["train.learning_rate=-1e-3..1e-3"], "should be above 0, not -0.001"),
        (["lora.r=8..16.5"], "lora.r: .*not 16.5"),
        (["lora.r=8,big"], "lora.r: .*not 'big'"),
        (["lora.r=8,8,16"], "names a value twice\n  fix:   lora.r=8,16"),
        (["lora.r=8,16", "lora.r=8..32"], "lora.r is searched twice"),
        (["lora.rank=8,16"], "lora.rank: unknown option; did you mean lora.r"),
        (["lora.init=1..2"], "lora.init: should be 'default' or 'gaussian', not '1..2'"),
        (["model.quantization=nf4,int8"], "model.quantization cannot be searched: a sweep loads one base once"),
        (["data.max_length=256,512"], "data.max_length cannot be searched: the held-out loss"),
        (["train.seed=1..9"], "train.seed cannot be searched: it decides which rows are held out"),
        (["out=a,b"], "out cannot be searched"),
        (["train.early_stopping=1,2", "data.validation=0"], "needs validation rows"),
        (["train.learning_rate=fast"], "train.learning_rate: should be a number"),
    ],
)
def test_what_is_wrong_is_refused_by_the_recipes_own_messages(words, said):
    with pytest.raises(RecipeError) as refusal:
        read_space([*BASE, *words])
    print(refusal.value)
    assert re.search(said, str(refusal.value)), str(refusal.value)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "there is nothing to search"),
        (["lora.r=8,16", "data.validation=0"], "data.validation is 0.*\n  fix:   data.validation=0.05"),
        (["lora.r=8,16", "train.processes=2"], "train.processes is 2.*\n  fix:   train.processes=1"),
        (["lora.r=8,16", "export.to=merged"], "trials are not exported"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(words, said):
    with pytest.raises(RecipeError) as refusal:
        sweep_request(read_space([*BASE, *words]), 3)
    print(refusal.value)
    assert re.search(said, str(refusal.value)), str(refusal.value)
