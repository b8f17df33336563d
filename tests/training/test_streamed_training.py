"""A whole run with weights on the host, on a CPU by copies within its memory: to the bit the run with weights on the device."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import nybble.training.preparation as preparation
import nybble.training.samples as samples
from nybble.engine.fuse import attach
from nybble.run.log import read_metrics
from nybble.training.train import resume, train
from nybble.weights.streamed import Streaming
from tests.engine.streaming import SynchronousCopier
from tests.training.test_checkpoints import WORDS
from tests.training.test_train import adapter_of, interrupted, recipe_for


@pytest.fixture
def copiers(monkeypatch):
    """What `fuse` does on a GPU, here; and no other weights for samples, as on a GPU."""
    made = []

    def fuse(model, policy, *, embedding, weights, resident_layers, **in_16_bits):
        if weights == "host":
            made.append(SynchronousCopier())
        return attach(model, policy, embedding, Streaming(made[-1], resident_layers) if weights == "host" else None)

    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: False
    )  # model.device=cpu would be refused beside engine.weights=host
    monkeypatch.setattr(preparation, "fuse", fuse)
    monkeypatch.setattr(samples, "temporarily_dequantised", contextlib.nullcontext)
    return made


def test_losses_samples_and_adapter_are_the_same(tiny_llama, rows, cache, tmp_path, copiers, quiet):
    runs = {}
    words = ["train.max_steps=4", "train.evaluate_every=2", "train.save_every=2", "train.learning_rate=5e-3"]
    for place in ("device", "host"):
        recipe = recipe_for(tiny_llama, rows, tmp_path / place, *words, "model.device=auto", f"engine.weights={place}")
        runs[place] = train(recipe, console=quiet, cache=cache)
    (copier,) = copiers
    assert copier.copies > 0
    device, host = ([(line.loss, line.eval_loss) for line in read_metrics(run)] for run in runs.values())
    assert host == device
    said = [
        [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()] for run in runs.values()
    ]
    assert said[0] == said[1]
    assert [record["step"] for record in said[1]] == [2, 4]
    assert all("error" not in record for record in said[1])
    expected, found = (adapter_of(run) for run in runs.values())
    assert all(torch.equal(found[name], part) for name, part in expected.items())


def test_it_resumes(tiny_llama, rows, cache, tmp_path, copiers, quiet, monkeypatch):
    words = [*WORDS, "model.device=auto", "engine.weights=host", "engine.resident_layers=1"]
    whole = train(recipe_for(tiny_llama, rows, tmp_path / "whole", *words), console=quiet, cache=cache)
    with monkeypatch.context() as patch:
        interrupted(patch, 3, recipe_for(tiny_llama, rows, tmp_path / "cut", *words), quiet, cache)
    resumed = resume(tmp_path / "cut", console=quiet, cache=cache)
    assert len(copiers) == 3
    expected, found = adapter_of(whole), adapter_of(resumed)
    assert all(torch.equal(found[name], part) for name, part in expected.items())
