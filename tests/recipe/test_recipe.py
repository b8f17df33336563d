"""Recipes: reading, overriding, faults all at once, and the shipped ones."""

from __future__ import annotations

import os
import shlex
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import RecipeError
from nybble.recipe import Recipe, dump_recipe, load_recipe, option_names
from nybble.recipe.values import example
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_all_faults_are_listed_together_with_their_lines(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model:\n  path: m\ntrain:\n  lerning_rate: 1\n  micro_batch: 0\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["lora.targets=7", "colour=red", "epochs=3"])
    text = str(caught.value)
    print(text)
    assert f"train.lerning_rate: unknown option ({file}:4); did you mean train.learning_rate?" in text
    assert f"train.micro_batch: should be at least 1, not 0 ({file}:5)" in text
    assert "lora.targets: should be a list, not 7" in text
    assert "epochs: unknown option; did you mean train.epochs=3?" in text
    assert "colour: unknown option" in text
    assert "has 6 faults" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter=a", "lora.r=4"], "lora: r cannot be set with adapter=a"),
        (["data.validation=0", "train.early_stopping=2"], "train.early_stopping: needs validation rows"),
        (["engine.fused=false", "engine.policy=host"], "engine.fused is false"),
        (
            ["engine.weights=sharded"],
            "engine.weights: sharded spreads weights over several processes, but train.processes is 1",
        ),
        (
            ["engine.weights=sharded-host", "train.processes=2", "model.device=cpu"],
            "sharded-host streams weights to a GPU",
        ),
        (
            ["engine.weights=sharded", "train.processes=2", "train.eval_tasks=[arc_easy]"],
            "which engine.weights=sharded cannot",
        ),
        (["engine.weights=host", "train.eval_tasks=[arc_easy]"], "train.eval_tasks: lm-eval builds a key-value cache"),
        (["engine.weights=host", "model.device=cpu"], "engine.weights: host streams weights to a GPU"),
        (["engine.resident_layers=3"], "engine.resident_layers: all layers' weights stay on the device"),
        (["engine.compute=fp8", "engine.fused=false"], "policy, embedding, weights and compute have no effect"),
        (["engine.fp8_skip=down_proj"], "fp8_skip and fp8_fast have no effect, because engine.compute is bf16"),
        (["engine.fp8_fast=none"], "fp8_skip and fp8_fast have no effect, because engine.compute is bf16"),
        (["engine.compute=fp8", "model.device=cpu"], "a CPU has no fp8 units"),
        (["engine.compute=fp8", "model.dtype=float16"], "give bfloat16, but model.dtype is float16"),
        (["engine.compute=fp8", "model.quantization=int8"], "layers in int8 are computed by Transformers"),
        (["engine.compute=fp8", "lora.dora=true"], "DoRA is computed by Transformers, which has no fp8"),
        (["engine.compute=fp8", "engine.fp8_fast=sideways"], "engine.fp8_fast"),
        (["engine.weights=host", "engine.fused=false"], "policy, embedding, weights and compute have no effect"),
        (["data.validation=-1"], "data.validation: a share below 1"),
        (["lora.targets=[]"], "lora.targets: an empty list"),
        (["train.epochs"], "options are written key=value"),
        (["train=3"], "train: should be a mapping"),
        (["train.seed=3", "train.seed.x=3"], "train.seed.x: seed is not a section"),
        (["data.map={a"], "data.map: brackets or quotes in '{a' are not closed; e.g. data.map=prompt:question,"),
        (["train.save_every=20", "train.evaluate_every=10"], "train.save_every: 20 differs from the 10 steps between"),
        (["train.epochs="], "train.epochs: the value is missing; e.g. train.epochs=1"),
        (["model.revision="], "e.g. model.revision=main, or model.revision=null for none"),
        (["train.epochs=two"], "not 'two'; e.g. train.epochs=1"),
        (["train.max_steps=1,000"], "not '1,000'; e.g. train.max_steps=100"),
        (["train.learning_rate=inf"], "train.learning_rate: should be a finite number"),
        (["lora.dora=perhaps"], "not 'perhaps'; e.g. lora.dora=true"),
        (["model.dtype=floaty"], "e.g. model.dtype=float16"),
        (["data.map=question"], "e.g. data.map=prompt:question,completion:answer"),
        (["model.rope_scaling=linear"], "e.g. 'model.rope_scaling={rope_type: linear, factor: 2.0}'"),
        (["lora=16"], "not 16; e.g. lora.r=16"),
        (["lora.r"], "'lora.r': options are written key=value, e.g. lora.r=16"),
        (["train.lr=1e-4"], "train.lr: unknown option"),
        (["out=caf\udce9"], "out: 'caf\\udce9' is not UTF-8"),
        (["model.path=caf\udce9"], "model.path: 'caf\\udce9' is not UTF-8"),
    ],
)
def test_contradictions_and_malformed_arguments_are_refused(arguments, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, arguments)
    print(caught.value)
    assert message in str(caught.value)


VALUES = {
    # as it is typed: what it means
    "model.path=1e5": "1e5",
    "model.path=runs/lr=1e-4/a: b #c": "runs/lr=1e-4/a: b #c",
    "model.revision=123456": "123456",
    "model.revision=1e10": "1e10",
    "model.revision=0o17": "0o17",
    "model.revision=null": None,
    "data.subset=2024-01-01": "2024-01-01",
    "data.revision=1:30": "1:30",
    "data.split=train[:10%]": "train[:10%]",
    "data.path=*.jsonl": "*.jsonl",
    "data.path=[a, 2024-01-01]": ["a", "2024-01-01"],
    "data.path={a.jsonl: 2, 7: .5}": {"a.jsonl": 2.0, "7": 0.5},
    "out=on": "on",
    "out=null": None,
    'out="a: b"': "a: b",
    "tracker.project=no": "no",
    "data.map={prompt: question, completion: on}": {"prompt": "question", "completion": "on"},
    "data.map={prompt:question,completion:2024-01-01}": {"prompt": "question", "completion": "2024-01-01"},
    "data.map=prompt:question,completion:answer": {"prompt": "question", "completion": "answer"},
    "data.map.prompt=on": "on",
    "lora.targets=q_proj,v_proj": ["q_proj", "v_proj"],
    "lora.targets=[q_proj, v_proj]": ["q_proj", "v_proj"],
    "lora.targets=q_proj": ["q_proj"],
    "lora.targets=all-linear": "all-linear",
    "export.to=merged,gguf": ["merged", "gguf"],
    "data.validation=10%": 0.1,
    "data.validation=0.1": 0.1,
    "data.validation=held-out.jsonl": "held-out.jsonl",
    "train.warmup=3%": 0.03,
    "train.max_steps=010": 10,
    "train.max_steps=1e3": 1000,
    "train.max_steps=none": None,
    "train.learning_rate=1e-4": 1e-4,
    "lora.dora=yes": True,
    "model.rope_scaling={rope_type: linear, factor: 2.0}": {"rope_type": "linear", "factor": 2.0},
}


def value_of(recipe, key):
    for name in key.split("."):
        recipe = recipe[name] if isinstance(recipe, dict) else getattr(recipe, name)
    return recipe


@pytest.mark.parametrize("argument", VALUES)
def test_a_value_is_read_by_the_type_of_its_option(argument):
    key = argument.partition("=")[0]
    found = value_of(load_recipe(None, [argument]), key)
    assert found == VALUES[argument]
    assert type(found) is type(VALUES[argument])


def test_a_file_is_read_by_the_same_types(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model:\n  path: 1e5\n  revision: 2024-01-01\ndata: &rest\n  subset: 2024\n  validation: 10%\n"
        "  map: {prompt: on, completion: 2024-13-45}\nlora:\n  targets: q_proj, v_proj\ntrain:\n  epochs: 2\n"
        "  max_steps:\nout: 7\n"
    )
    recipe = load_recipe(file)
    assert (recipe.model.path, recipe.model.revision, recipe.data.subset) == ("1e5", "2024-01-01", "2024")
    assert (recipe.data.validation, recipe.data.map) == (0.1, {"prompt": "on", "completion": "2024-13-45"})
    assert (recipe.lora.targets, recipe.train.epochs, recipe.train.max_steps) == (["q_proj", "v_proj"], 2.0, None)
    assert recipe.out == "7"
    assert load_recipe(file, ["data.map=input:context"]).data.map == {"input": "context"}, (
        "an argument replaces the file's"
    )


def test_arguments_that_a_shell_makes_from_braces_are_merged():
    arguments = ["data.map=prompt:question", "data.map=completion:answer", "lora.targets=q_proj", "lora.targets=v_proj"]
    recipe = load_recipe(
        None, [*arguments, "data.path=a.jsonl", "data.path=b.jsonl", "train.epochs=2", "train.epochs=3"]
    )
    assert recipe.data.map == {"prompt": "question", "completion": "answer"}
    assert (recipe.lora.targets, recipe.data.path, recipe.train.epochs) == (
        ["q_proj", "v_proj"],
        ["a.jsonl", "b.jsonl"],
        3,
    )


@pytest.mark.parametrize("key", list(option_names()))
def test_the_example_of_every_option_is_valid(key, tmp_path):
    sections = key.split(".")[:-1]
    beside = ["train.max_steps=9", "data.validation=3"] if key == "data.streaming" else []
    beside += ["engine.compute=fp8"] if key.startswith("engine.fp8") else []
    beside += (
        [f"train.objective={'simpo' if key.endswith('gamma') else 'kto'}"] if key.startswith("preference.") else []
    )
    (argument,) = shlex.split(example(key))
    recipe = load_recipe(None, [*beside, argument])
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(f"{name}:\n  " for name in sections) + example(key, in_file=True))
    assert value_of(load_recipe(file, beside), key) == value_of(recipe, key)


def test_a_recipe_in_latin_1_and_one_with_control_characters_get_a_message_with_the_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes("model:\n  path: café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8: byte 0xe9") as caught:
        load_recipe(file)
    print(caught.value)
    assert (caught.value.where, "iconv" in caught.value.fix) == (f"{file}:2", True)
    file.write_text("model:\n  path: a\x07b\n")
    with pytest.raises(RecipeError, match="a character that YAML does not allow: 0x7") as caught:
        load_recipe(file)
    assert caught.value.where == f"{file}:2"
    with pytest.raises(RecipeError, match="is a folder, not a file"):
        load_recipe(tmp_path)


def test_a_name_that_is_not_utf_8_survives_a_round_trip(tmp_path):
    recipe = load_recipe(None, ["model.path=m", "data.path=caf\udce9.jsonl"])
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(("text", "line"), [("model: [\n", 2), ("- a\n", 1), ("a: b: c\n", 1)])
def test_broken_yaml_is_named_with_its_line(tmp_path, text, line):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    print(caught.value)
    assert f"{file}:{line}" in str(caught.value)


LAUGHS = "".join(f"x{n}: &x{n} {{a: *x{n - 1}, b: *x{n - 1}}}\n" for n in range(1, 60))
DAMAGED = {
    "deep": ("model: " + "[" * 5000, "recipe.yaml is nested too deeply"),
    "deep mapping": ("model: " + "{a: " * 5000, "recipe.yaml is nested too deeply"),
    "digits": ("data:\n  max_length: " + "9" * 5000, "data.max_length: should be a whole number"),
    "digits of an unknown option": ("datum: " + "9" * 5000, "a value that cannot be read"),
    "tag of a truth": ("datum: !!bool x\n", "recipe.yaml:1"),
    "tag of a number": ("datum: !!int ''\n", "recipe.yaml:1"),
    "tag of a date": ("model:\n  paths: !!timestamp x\n", "recipe.yaml:2"),
    "list as a key": ("? [a]\n: b\n", "recipe.yaml:1"),
    "mapping as a key": ("data:\n  map: {? {a: b} : c}\n", "a key must be text, not a list or a mapping"),
    "laughs": ("x0: &x0 {a: 1}\n" + LAUGHS, "x59: unknown option"),
    "laughs for a value": ("data:\n  path:\n    x0: &x0 {a: 1}\n" + textwrap.indent(LAUGHS, "    "), "data.path: "),
    "itself": ("model: &m\n  path: *m\n", "recipe"),
    "tag": ("model: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor"),
    "zeros": ("model:\n  path: m\n" + "\0" * 100, "a character that YAML does not allow: 0x0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_recipe_is_one_message(name, tmp_path):
    text, what = DAMAGED[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    print(str(caught.value)[:500])
    assert what in str(caught.value)
    assert len(str(caught.value)) < 100_000


@pytest.mark.parametrize(
    "argument, what",
    [
        ("train.max_steps=" + "9" * 5000, "train.max_steps: should be a whole number"),
        ("datum=" + "9" * 5000, "datum: '999"),
        (f"train.seed={2**70}", "train.seed: should be below 4294967296"),
        ("datum=!!timestamp x", "datum: '!!timestamp x' cannot be read"),
        ("data.map=" + "{a: " * 5000, "data.map: '{a: "),
        ("data.map={[a]: b}", "data.map: '{[a]: b}' cannot be read; e.g. data.map="),
    ],
)
def test_an_argument_that_yaml_cannot_read_is_one_fault(argument, what):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [argument])
    print(caught.value)
    assert what in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_recipe_must_be_a_regular_file(kind, tmp_path):
    place = tmp_path / "recipe.yaml"
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    with pytest.raises(RecipeError, match=f"recipe.yaml is a {kind}, not a file") as caught:
        load_recipe(place)
    print(caught.value)
    assert "iconv" not in caught.value.fix


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
    assert len(list(option_names())) == sum(not line.lstrip().startswith("#") for line in lines) - 8  # eight sections


@given(st.sampled_from([name for name in option_names() if name.startswith("train.")]), st.integers(-5, 10**6))
def test_any_number_for_any_option_is_accepted_or_refused_with_its_name(name, value):
    try:
        recipe = load_recipe(None, [f"{name}={value}"])
    except RecipeError as error:
        assert name.split(".")[-1] in str(error)  # noqa: PT017
    else:
        found = getattr(recipe.train, name.split(".")[-1])
        assert found == (str(value) if isinstance(found, str) else value)
