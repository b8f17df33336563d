"""Recipes: reading, overriding, faults all at once, and the shipped ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from nybble.errors import RecipeError
from nybble.recipe import Recipe, dump_recipe, load_recipe, option_names

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_all_faults_are_listed_together_with_their_lines(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model:\n  path: m\ntrain:\n  lerning_rate: 1\n  micro_batch: 0\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["lora.targets=7", "colour=red", "epochs=3"])
    text = str(caught.value)
    print(text)
    assert f"train.lerning_rate: unknown option ({file}:4); did you mean train.learning_rate?" in text
    assert f"train.micro_batch: input should be greater than or equal to 1, not 0 ({file}:5)" in text
    assert "lora.targets: input should be a valid list, not 7" in text
    assert "epochs: unknown option; did you mean train.epochs?" in text
    assert "colour: unknown option" in text
    assert "has 6 faults" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter=a", "lora.r=4"], "lora: r cannot be set beside adapter=a"),
        (["data.validation=0", "train.early_stopping=2"], "train.early_stopping: needs validation rows"),
        (["engine.fused=false", "engine.policy=host"], "engine.fused is false"),
        (["engine.embedding=host", "train.processes=2"], "engine.embedding: host is for one process"),
        (["data.validation=-1"], "data.validation: a share below 1"),
        (["lora.targets=[]"], "lora.targets: an empty list"),
        (["train.epochs"], "options are written key=value"),
        (["train=3"], "train: input should be a valid dictionary"),
        (["train.seed=3", "train.seed.x=3"], "train.seed.x: seed is not a section"),
        (["data.map={a"], "is not a value"),
    ],
)
def test_contradictions_and_malformed_words_are_refused(words, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, words)
    print(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "line"), [("model: [\n", 2), ("- a\n", 1), ("a: b: c\n", 1)])
def test_broken_yaml_is_named_with_its_line(tmp_path, text, line):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    print(caught.value)
    assert f"{file}:{line}" in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(file, tmp_path):
    recipe = load_recipe(file)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert recipe.model.path.startswith("meta-llama/Llama-2-7b")


def test_the_shipped_recipes_say_what_they_are_known_for():
    by_name = {file.stem: load_recipe(file) for file in RECIPES}
    classic = by_name["llama2-7b-alpaca"]
    assert (classic.model.quantization, classic.model.double_quantization) == ("nf4", True)
    assert classic.lora.targets == ["q_proj", "v_proj"]
    assert by_name["llama2-7b-alpaca-all-linear"].lora.targets == "all-linear"
    paper = by_name["llama2-7b-qlora-paper"]
    assert (paper.lora.r, paper.lora.alpha, paper.lora.dropout, paper.lora.targets) == (64, 16, 0.1, "all-linear")
    train = paper.train
    assert (train.learning_rate, train.scheduler, train.warmup, train.max_grad_norm) == (2e-4, "constant", 0.03, 0.3)
    assert train.micro_batch * train.accumulation == 16
    assert by_name["llama2-7b-chat-messages"].data.template == "llama2"
    assert by_name["llama2-7b-summarize"].data.form == "prompt"


def test_every_option_is_documented_in_the_printed_recipe():
    lines = dump_recipe(Recipe()).splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("#"):
            assert len(lines[number - 1].strip()) > 12, f"nothing above {line}"
            assert lines[number - 1].lstrip().startswith("#")
    assert len(list(option_names())) == sum(not line.lstrip().startswith("#") for line in lines) - 7  # seven sections


@given(st.sampled_from([name for name in option_names() if name.startswith("train.")]), st.integers(-5, 10**6))
def test_any_number_for_any_option_is_taken_or_refused_by_name(name, value):
    try:
        recipe = load_recipe(None, [f"{name}={value}"])
    except RecipeError as error:
        assert name.split(".")[-1] in str(error)  # noqa: PT017
    else:
        assert getattr(recipe.train, name.split(".")[-1]) == value
