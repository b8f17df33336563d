"""Command-line arguments: what is a path, what is an option, and which line is shown if one is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.training.test_train import open_run, recipe_for, train


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with names that look like options, to work in."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "lr=1e-4", "runs/lr=1e-4/adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("rows.jsonl", "a=b.jsonl", "v=1.jsonl", "v=2.jsonl", "lora.r=4"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


RIGHT = {
    # what is typed behind MODEL and DATA: what the recipe says
    "--epochs 2": ("train.epochs", 2.0),
    "--epochs=2": ("train.epochs", 2.0),
    "epochs=2": ("train.epochs", 2.0),
    "--train.epochs 2": ("train.epochs", 2.0),
    "--train-epochs 2": ("train.epochs", 2.0),
    "--num_train_epochs 2": ("train.epochs", 2.0),
    "--lora.r 32": ("lora.r", 32),
    "--lora-r 32": ("lora.r", 32),
    "--lr 1e-4": ("train.learning_rate", 1e-4),
    "--learning-rate 1e-4": ("train.learning_rate", 1e-4),
    "--validation 10%": ("data.validation", 0.1),
    "--packing": ("data.packing", True),
    "--packing --seed 3": ("data.packing", True),
    "--packing false": ("data.packing", False),
    "--no-double-quantization": ("model.double_quantization", False),
    "--targets q_proj,v_proj": ("lora.targets", ["q_proj", "v_proj"]),
    "--targets [q_proj, v_proj]": ("lora.targets", ["q_proj", "v_proj"]),
    "lora.targets=[q_proj, v_proj] lora.r=2": ("lora.targets", ["q_proj", "v_proj"]),
    "data.map={prompt: question, completion: answer} lora.r=2": (
        "data.map",
        {"prompt": "question", "completion": "answer"},
    ),
    "adapter=runs/lr=1e-4/adapter": ("adapter", "runs/lr=1e-4/adapter"),
    "out=runs/lr=1e-4": ("out", "runs/lr=1e-4"),
}


@pytest.mark.parametrize("typed", RIGHT)
def test_the_options_of_other_programs_are_understood(typed, place, here):
    said = here("train", "m", "rows.jsonl", *typed.split(), "--print-config")
    assert said.returncode == 0, said.stderr
    key, value = RIGHT[typed]
    found = yaml.safe_load(said.stdout)
    for name in key.split("."):
        found = found[name]
    assert (float(found) if isinstance(value, float) else found) == value


@pytest.mark.parametrize(
    ("words", "model", "data"),
    [
        (["lr=1e-4", "a=b.jsonl"], "lr=1e-4", "a=b.jsonl"),
        (["runs/lr=1e-4/adapter", "v=*.jsonl"], "runs/lr=1e-4/adapter", "v=*.jsonl"),
        (["m", "./lora.r=4"], "m", "./lora.r=4"),
        (["1e5", "2024-01-01"], "1e5", "2024-01-01"),
        (["on", "{a,b}.jsonl"], "on", "{a,b}.jsonl"),
        (["--model", "m", "--data", "rows.jsonl"], "m", "rows.jsonl"),
        (["m", "data.path=a.jsonl", "data.path=b.jsonl"], "m", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_a_path_is_a_path_whatever_it_looks_like(words, model, data, place, here):
    said = here("train", *words, "--print-config")
    assert said.returncode == 0, said.stderr
    recipe = yaml.safe_load(said.stdout)
    assert (str(recipe["model"]["path"]), recipe["data"]["path"]) == (model, data)
    assert recipe["lora"]["r"] == 16


WRONG = {
    # what is typed behind MODEL and DATA: what is said, and the line that is shown
    "train.epochs = 2": ("train.epochs: options are written key=value, without spaces", "train.epochs=2"),
    "train.epochs =2": ("train.epochs: options are written key=value, without spaces", "train.epochs=2"),
    "train.epochs= 2": ("train.epochs: options are written key=value, without spaces", "train.epochs=2"),
    "train.epochs 2": ("train.epochs: options are written key=value, without spaces", "train.epochs=2"),
    "train.epochs": ("train.epochs: options are written key=value, without spaces", "train.epochs=1"),
    "train.epochs= lora.r=2": ("train.epochs: the value is missing; e.g. train.epochs=1", ""),
    "--epochs": ("--epochs: the value is missing", "train.epochs=1"),
    "--epochs lora.r=2": ("--epochs: the value is missing", "train.epochs=1"),
    "--epochz 3": ("there is no option --epochz", "train.epochs=3"),
    "--resum x": ("there is no option --resum", "--resume"),
    "--colour red": ("there is no option --colour", "every option: nybble train --print-config"),
    "--revision x": (
        "--revision is ambiguous: it may be model.revision or data.revision",
        "model.revision=x or data.revision=x",
    ),
    "Train.Epochs=2": ("Train.Epochs: unknown option; did you mean train.epochs=2?", ""),
    "epoch=2": ("epoch: unknown option; did you mean train.epochs=2?", ""),
    "model.path=b": ("MODEL was given twice: m and model.path=b", ""),
    "more.jsonl": ("unexpected 'more.jsonl': expected at most MODEL and DATA, then key=value", "train.epochs=2"),
    "data.map={prompt: question": (
        "brackets or quotes in '{prompt: question' are not closed",
        "data.map=prompt:question,completion:answer",
    ),
    "train.save_every=3 train.evaluate_every=2": ("train.save_every: 3 differs from the 2 steps", "train.save_every=2"),
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_argument_shows_the_line_to_type(typed, place, here):
    said = here("train", "m", "rows.jsonl", *typed.split())
    print(said.stderr)
    assert said.returncode == 2
    assert all(part in said.stderr for part in WRONG[typed])
    assert "Traceback" not in said.stderr


MISSING = [
    (["train", "./x", "rows.jsonl"], "there is no folder ./x"),
    (["train", "x", "rows.jsonl"], "there is no folder x"),
    (["train", "/nowhere/x", "rows.jsonl"], "there is no folder /nowhere/x"),
    (["train", "m", "none.jsonl"], "there is no file none.jsonl"),
    (["train", "m", "none.csv.gz"], "there is no file none.csv.gz"),
    (["train", "m", "rows.jsonl", "data.validation=held.jsonl"], "there is no file held.jsonl"),
    (["train", "m", "rows.jsonl", "data.template=own.jinja"], "there is no template own.jinja"),
    (["train", "m", "rows.jsonl", "adapter=runs/none"], "there is no adapter in runs/none"),
    (["train", "m", "rows.jsonl", "train.save_every=3", "train.evaluate_every=2"], "train.save_every: 3 differs"),
    (["train", "m", "rows.jsonl", "--epochz", "2"], "train.epochs=2"),
    (["train", "-c", "none.yaml"], "there is no recipe none.yaml"),
    (["data", "check", "/nowhere.jsonl"], "there is no file /nowhere.jsonl"),
    (["data", "preview", "rows.jsonl", "./x"], "there is no folder ./x"),
    (["chat", "runs/none"], "there is no folder runs/none"),
    (["eval", "runs/none"], "there is no folder runs/none"),
    (["export", "runs/none", "--to", "merged"], "there is no folder runs/none"),
    (["serve", "runs/none"], "there is no folder runs/none"),
]
PROBE = """
import json, sys
from nybble.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["nybble", *words]
    try:
        main()
    except SystemExit as end:
        print("status", end.code, "torch" in sys.modules, file=sys.stderr)
"""


def test_wrong_paths_and_faults_of_the_recipe_are_reported_before_torch_is_imported(place):
    words = json.dumps([words for words, _ in MISSING])
    said = subprocess.run([sys.executable, "-c", PROBE, words], capture_output=True, text=True, cwd=place, check=True)
    print(said.stderr)
    parts = said.stderr.split("status ")
    for (_, message), before, after in zip(MISSING, parts, parts[1:], strict=False):
        assert message in before
        assert after.split()[0] in ("1", "2")
        assert after.split()[1] == "False", f"torch was imported before {message}"
    assert len(parts) == len(MISSING) + 1
    assert "Traceback" not in said.stderr


def test_a_name_in_latin_1_is_a_path_and_is_shown(place):
    name = b"caf\xe9.jsonl"
    (place / os.fsdecode(name)).write_text('{"prompt": "a", "completion": ""}\n')
    said = subprocess.run(
        [sys.executable, "-m", "nybble", "data", "check", name], capture_output=True, cwd=place, check=False
    )
    print(said.stdout, said.stderr)
    assert said.returncode == 1
    assert b"a row without an answer" in said.stdout
    assert re.search(rb"where: \S*/caf", said.stdout)
    assert b"Traceback" not in said.stderr
    for words, message in (
        (["m", b"n\xe9ant.jsonl"], b"there is no file n"),
        ([b"caf\xe9.jsonl", "rows.jsonl"], b"is not UTF-8"),
        (["m", "rows.jsonl", b"out=\xe9"], b"out: '\\udce9' is not UTF-8"),
    ):
        said = subprocess.run(
            [sys.executable, "-m", "nybble", "train", *words], capture_output=True, cwd=place, check=False
        )
        assert message in said.stderr, said.stderr
        assert b"Traceback" not in said.stderr


def test_a_run_on_rows_whose_name_is_latin_1(tiny_llama, rows, cache, tmp_path, quiet):
    name = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    name.write_bytes(rows.read_bytes())
    words = ["train.max_steps=1", "train.samples=0", "train.evaluate_every=1"]
    run = train(recipe_for(tiny_llama, name, tmp_path / "run", *words), console=quiet, cache=cache)
    assert open_run(run.folder).recipe.data.path == str(name)
    for file in ("start.json", "summary.json"):
        assert os.fsencode(name) == os.fsencode(path_in(json.loads((run.folder / file).read_text(encoding="utf-8"))))


def path_in(record):
    return record.get("recipe", record)["data"]["path"]
