"""Damaged folders of base models: each is refused in one sentence, or taken for a reason."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal

import pytest
import torch

from nybble.errors import NybbleError
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import Base, load_base
from nybble.recipe import ModelOptions
from tests.corpus.cases import Outcome, held, nybble, sampled
from tests.corpus.models import CASES, COMMANDS, ModelCase

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
def stored(tiny_llama, tmp_path_factory) -> pathlib.Path:
    """The tiny Llama as bitsandbytes stores it, in nf4/ and int8/."""
    place = tmp_path_factory.mktemp("stored")
    for kind, dtype in (("nf4", torch.float32), ("int8", torch.bfloat16)):
        options = ModelOptions(path=str(tiny_llama), quantization=kind)
        base = load_base(find_checkpoint(str(tiny_llama)), options, dtype, CPU, place / "cache")
        base.model.save_pretrained(place / kind)
    return place


def damaged(case: ModelCase, tiny_llama: pathlib.Path, stored: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    shutil.copytree(tiny_llama, place / "model")
    for kind in ("nf4", "int8"):
        if case.name.startswith(kind):
            shutil.copytree(stored / kind, place / kind)
    case.make(place / "model")
    return place / "model"


def load(case: ModelCase, folder: pathlib.Path, cache: pathlib.Path) -> Base | NybbleError:
    options = {} if case.name.startswith("int8") else {"quantization": case.quantization}
    try:
        with deadline():
            return load_base(find_checkpoint(str(folder)), ModelOptions(**options), case.dtype, CPU, cache)
    except NybbleError as error:
        return error


def outcome_of(result: Base | NybbleError, folder: pathlib.Path) -> Outcome:
    """What a user would read; a message says what is wrong in one sentence, where, and what mends it."""
    if isinstance(result, NybbleError):
        assert result.fix, result
        assert result.where or str(folder) in result.what, result
        assert len(result.what) < 500, result
        assert "\n" not in result.what, result
        return Outcome(result.exit_code, str(result))
    if result.model.dtype != torch.float16:  # a CPU computes in it, but not with numbers of this size
        ids = torch.arange(3, 35)[None]
        assert result.model(input_ids=ids).logits.isfinite().all(), "it was taken and does not compute"
    return Outcome(0, "\n".join(result.notices))


@pytest.mark.parametrize("case", sampled(CASES, 9))
def test_a_damaged_model(case, tiny_llama, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a pickle that runs would leave its mark
    folder = damaged(case, tiny_llama, stored, tmp_path)
    outcome = outcome_of(load(case, folder, tmp_path / "cache"), folder)
    print(outcome.text)
    held(case, outcome)
    assert not (tmp_path / "ran").exists(), "a pickle was run"
    if case.status:
        assert not (tmp_path / "cache" / "base").exists(), "a damaged base was kept"


@pytest.mark.parametrize("case", sampled(COMMANDS, 4))
def test_a_damaged_model_on_the_command_line(case, tiny_llama, stored, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = damaged(case, tiny_llama, stored, tmp_path)
    with deadline():
        outcome = nybble(
            "train",
            folder,
            rows,
            "model.device=cpu",
            "data.validation=0",
            "data.max_length=128",
            cache=tmp_path / "cache",
        )
    print(outcome.text)
    held(case, outcome)
    assert not (tmp_path / "ran").exists(), "a pickle was run"
    assert not list(tmp_path.glob("runs/*/adapter")), "it was trained"


def test_there_are_as_many_as_promised():
    assert len(CASES) + len(COMMANDS) >= 240
    assert len({case.name for case in CASES}) == len(CASES)
