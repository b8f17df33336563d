"""Damaged folders of base models: each is refused in one sentence, or taken for a reason."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal

import pytest
import torch

from corpus.cases import Outcome, held, nybble, sampled
from corpus.models import CASES, COMMANDS, ModelCase
from nybble.errors import NybbleError
from nybble.model.base import load_base
from nybble.model.checkpoint import find_checkpoint
from nybble.recipe import ModelOptions

CPU = torch.device("cpu")
SECONDS = 30  # a pipe or a device that is opened never ends


@contextlib.contextmanager
def deadline():
    def late(number, frame):
        raise AssertionError(f"it takes over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def nf4(tiny_llama, tmp_path_factory) -> pathlib.Path:
    """The tiny Llama as bitsandbytes stores it."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("nf4")
    options = ModelOptions(path=str(tiny_llama))
    load_base(find_checkpoint(str(tiny_llama)), options, torch.float32, CPU, cache).model.save_pretrained(folder)
    return folder


def damaged(case: ModelCase, tiny_llama: pathlib.Path, nf4: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    shutil.copytree(tiny_llama, place / "model")
    if case.name.startswith("nf4"):
        shutil.copytree(nf4, place / "nf4")
    case.make(place / "model")
    return place / "model"


def load(case: ModelCase, folder: pathlib.Path, cache: pathlib.Path) -> Outcome:
    options = ModelOptions(path=str(folder), quantization=case.quantization)
    try:
        with deadline():
            base = load_base(find_checkpoint(str(folder)), options, case.dtype, CPU, cache)
    except NybbleError as error:
        assert error.fix, "what mends it?"
        assert error.where or str(folder) in error.what, "where is it?"
        assert len(error.what) < 500, error.what
        assert "\n" not in error.what, error.what
        return Outcome(error.exit_code, str(error))
    ids = torch.arange(3, 35)[None]
    if case.dtype == torch.float32:
        assert base.model(input_ids=ids).logits.isfinite().all(), "it was taken and does not compute"
    return Outcome(0, "\n".join(base.notices))


@pytest.mark.parametrize("case", sampled(CASES, 9))
def test_a_damaged_model(case, tiny_llama, nf4, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a pickle that runs would leave its mark
    folder = damaged(case, tiny_llama, nf4, tmp_path)
    outcome = load(case, folder, tmp_path / "cache")
    print(outcome.text)
    held(case, outcome)
    assert not (tmp_path / "ran").exists(), "a pickle was run"
    if case.status:
        assert not (tmp_path / "cache" / "base").exists(), "a damaged base was kept"


@pytest.mark.parametrize("case", sampled(COMMANDS, 4))
def test_a_damaged_model_on_the_command_line(case, tiny_llama, nf4, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = damaged(case, tiny_llama, nf4, tmp_path)
    with deadline():
        outcome = nybble("train", folder, rows, "model.device=cpu", "data.validation=0", cache=tmp_path / "cache")
    print(outcome.text)
    held(case, outcome)
    assert not (tmp_path / "ran").exists(), "a pickle was run"
    assert not list(tmp_path.glob("runs/*/adapter")), "it was trained"


def test_there_are_as_many_as_promised():
    assert len(CASES) + len(COMMANDS) >= 240
    assert len({case.name for case in CASES}) == len(CASES)
