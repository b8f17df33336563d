"""A run of version 0.5.1, by its own records, goes on, answers and is exported.

tests/release_0_5_1 is what 0.5.1 wrote of a run on that base's tokenizer and those rows, all but weights:

    nybble train models/base data/rows.jsonl data.bad_rows=drop data.validation=8 data.max_length=128 lora.r=2 train.max_steps=6
        train.evaluate_every=2 train.micro_batch=4 train.accumulation=1 train.learning_rate=1e-2 train.samples=0
        model.dtype=float32 model.device=cpu out=runs/done

The template reads the clock. Of the rows, 0.5.1 left out three, of which two are read by now, and took one with a picture.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.recipe import absolute_paths, load_recipe
from nybble.run.folder import Run, open_run
from nybble.run.marks import COMPLETE
from nybble.run.versions import versions
from nybble.serve.loading import load_pipeline
from nybble.training.train import train
from tests.conftest import ROOT
from tests.local_server import serving
from tests.training.test_train import adapter_of, interrupted, read_metrics_but_time

RECORDS = ROOT / "tests" / "release_0_5_1"
BEGAN = datetime.datetime(2026, 11, 27, 0, 37)


@pytest.fixture(scope="module")
def made(tiny_llama, cache, tmp_path_factory):
    """The same run by this version, whole and interrupted, on the rows that 0.5.1 used, as they are read by now."""
    folder = tmp_path_factory.mktemp("now")
    place(folder, tiny_llama)
    lines = (RECORDS / "rows.jsonl").read_text().splitlines()
    used = [line.replace(', "images": ["seven.png"]', "") for line in lines[:20] + lines[23:]]
    (folder / "data" / "rows.jsonl").write_text("".join(line + "\n" for line in used))
    recipe = absolute_paths(load_recipe(RECORDS / "run" / "recipe.yaml", [f"model.path={folder}/models/base"]))
    data = recipe.data.model_copy(update={"path": str(folder / "data" / "rows.jsonl")})
    recipe = recipe.model_copy(update={"data": data})
    quiet = Console(quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.data.text.template.today", BEGAN.date)
        whole = train(recipe.model_copy(update={"out": str(folder / "whole")}), console=quiet, cache=cache)
        interrupted(patch, 3, recipe.model_copy(update={"out": str(folder / "cut")}), quiet, cache)
    return whole, open_run(folder / "cut")


def place(folder: pathlib.Path, tiny_llama: pathlib.Path) -> None:
    shutil.copytree(tiny_llama, folder / "models" / "base")
    shutil.copytree(RECORDS / "base", folder / "models" / "base", dirs_exist_ok=True)
    (folder / "data").mkdir()


def old(run: Run, name: str) -> Run:
    """The records of 0.5.1 around a run's weights; versions and base are this machine's, or it would rightly be refused."""
    folder = pathlib.Path("runs", name)
    shutil.copytree(run.folder, folder)
    shutil.copytree(RECORDS / "run", folder, dirs_exist_ok=True)
    base = json.loads((run.folder / "start.json").read_text())["base"]
    record = json.loads((folder / "start.json").read_text())
    record |= {"base": base, "versions": {**versions(), "nybble": "0.5.1"}}
    (folder / "start.json").write_text(json.dumps(record))
    summary = json.loads((folder / "summary.json").read_text())
    summary["base"]["fingerprint"] = base
    (folder / "summary.json").write_text(json.dumps(summary))
    os.utime(folder / "start.json", (BEGAN.timestamp(), BEGAN.timestamp()))
    for file in folder.rglob(COMPLETE):
        file.write_bytes(b"") if file.parent.name != "adapter" else file.unlink()
    for file in folder.rglob("adapter_config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "models/base"}))
    return Run(folder, run.recipe)


@pytest.fixture
def project(tiny_llama, tmp_path, monkeypatch) -> Iterator[pathlib.Path]:
    """Where somebody worked with 0.5.1, and typed relative paths."""
    monkeypatch.setenv("TZ", "UTC")  # the day is that of the place where the run was made
    time.tzset()
    place(tmp_path, tiny_llama)
    shutil.copy(RECORDS / "rows.jsonl", tmp_path / "data" / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


def test_it_resumes_as_if_nothing_had_happened(project, made, cache, here):
    whole, cut = made
    run = old(cut, "cut")
    shutil.copy(cut.metrics, run.metrics)
    (run.folder / "summary.json").unlink()
    told = here("--cache", cache, "train", "--resume", run.folder)
    assert told.returncode == 0, told.stderr
    assert "template model (its date stays 27 Nov 2026)" in told.stdout
    assert "3 bad rows" in told.stdout
    assert read_metrics_but_time(run) == read_metrics_but_time(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(run).items())
    fingerprint = json.loads((RECORDS / "run" / "summary.json").read_text())["data"]["fingerprint"]
    assert json.loads((run.folder / "summary.json").read_text())["data"]["fingerprint"] == fingerprint


def test_it_answers_and_is_measured_and_exported(project, made, cache, here):
    run = old(made[0], "done")
    question = ("--prompt", "say red", "--max-new-tokens", 4)
    said = here("--cache", cache, "chat", run.folder, *question)
    assert said.returncode == 0, said.stderr
    measured = here("--cache", cache, "eval", run.folder, "--tasks", "none", "--answers", 2)
    assert measured.returncode == 0, measured.stderr
    results = json.loads((run.folder / "evaluation.json").read_text())
    assert "the data changed" not in measured.stdout + json.dumps(results)
    assert "held-out loss         8" in measured.stdout
    for kind in ("adapter", "merged"):
        done = here("--cache", cache, "export", run.folder, "--to", kind)
        assert done.returncode == 0, done.stderr
        assert " passed: " in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "export" / "merged")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "say red"}], tokenize=False)
    assert asked == "<s>Today is 27 Nov 2026.\n[INST] say red [/INST]"
    AutoModelForCausalLM.from_pretrained(run.folder / "export" / "merged")
    with serving(
        lambda metrics: load_pipeline([open_run(run.folder)], metrics, device="cpu", queue=8, cache=cache)
    ) as server:
        answer = server.chat("done", "say red", max_tokens=4, temperature=0)
    assert answer["choices"][0]["message"]["content"].strip() == said.stdout.splitlines()[0].strip()


def test_it_is_finished(project, made, cache, here):
    run = old(made[0], "done")
    refused = here("--cache", cache, "train", "--resume", run.folder)
    assert refused.returncode == 1
    assert "runs/done is finished: there is nothing to resume" in refused.stderr
