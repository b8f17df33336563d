"""Damaged and odd adapters: one sentence each that names the field or the tensor, or what the adapter changes."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from nybble.errors import NybbleError
from nybble.model.adapter import patterns
from nybble.model.adapter.lora import add_adapter, load_adapter
from nybble.model.adapter.updates import updates_of
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.recipe import ModelOptions
from nybble.run.folder import open_run
from tests.corpus.adapters import CASES, CONFIG, PICKLE, TENSORS
from tests.corpus.cases import Outcome, held, nybble, sampled

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def base(tiny_llama, cache):
    """The tiny Llama as it is; each case gets a copy, for PEFT alters what it is given."""
    options = ModelOptions(path=str(tiny_llama), quantization="none")
    return load_base(find_checkpoint(str(tiny_llama)), options, torch.float32, torch.device("cpu"), cache).model.eval()


@pytest.fixture(scope="module")
def good(base, tiny_llama, tmp_path_factory):
    """What all cases are made from."""
    folder = tmp_path_factory.mktemp("adapters") / "good"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.1, 0.1)
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def opened(base, folder, first=None):
    """The adapter alone on a copy of the base, or beside a first one, as it is opened by every command."""
    model = copy.deepcopy(base)
    try:
        run = open_run(folder)
        if first is not None:
            name, model = "other", load_adapter(model, first)
            add_adapter(model, run.adapter, name)
        else:
            name, model = "default", load_adapter(model, run.adapter)
    except NybbleError as error:
        return Outcome(error.exit_code, str(error)), None
    told = str(updates_of(model, name, run.adapter))
    if first is not None:
        model.set_adapter(name, inference_mode=True)
    return Outcome(0, told), model


def test_there_are_enough():
    assert len(CASES) >= 200


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("case", sampled(CASES, every=8))
def test_adapters(case, base, good, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    case.make(folder)
    alone, model = opened(base, folder)
    print(alone.text)
    held(case, alone)
    beside, second = opened(base, folder, first=good)
    held(case, beside)
    if case.status == 0:
        tuned = logits(model)
        assert tuned.isfinite().all()
        assert torch.equal(tuned, logits(second))
        for one in (model, second):
            with one.disable_adapter():
                assert torch.equal(logits(one), logits(base)), "switched off, it must leave the base as it was"


@pytest.mark.parametrize("name", ["fan in, fan out", "biases of a base without any", "LoftQ's settings without it"])
def test_settings_without_effect_give_no_warning(name, base, good, tmp_path):
    """At loading and while the adapter is off, alone and beside another; warnings are errors here."""
    folder = damaged(name, good, tmp_path / "adapter")
    for first in (None, good):
        outcome, model = opened(base, folder, first=first)
        assert outcome.status == 0, outcome.text
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
def test_damage_anywhere_gives_a_message_or_changes_only_numbers(seed, base, good, tmp_path):
    """Bytes changed, cut out or doubled at random places of each file; nothing but a NybbleError may come of it."""
    draw = random.Random(seed)
    torch.save(load_file(good / TENSORS), tmp_path / PICKLE)
    sources = {CONFIG: repeatable(good / CONFIG)}
    sources |= {file.name: file.read_bytes() for file in (good / TENSORS, tmp_path / PICKLE)}
    for number in range(12):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        name = draw.choice(list(sources))
        if name == PICKLE:
            (folder / TENSORS).unlink()
        content = bytearray(sources[name])
        start = draw.randrange(min(len(content), 3000))  # where headers are
        way = draw.randrange(4)
        if way == 0:
            content[start] ^= 1 << draw.randrange(8)
        elif way == 1:
            del content[start : start + draw.randrange(1, 40)]
        elif way == 2:
            content[start:start] = content[start : start + draw.randrange(1, 40)]
        else:
            content[start : start + 8] = draw.randbytes(8)
        (folder / name).write_bytes(content)
        outcome, model = opened(base, folder)
        print(number, name, way, start, outcome.text)
        assert outcome.text
        assert model is None or logits(model).shape == (2, 16, 400)


def repeatable(file):
    """The config without what differs from run to run, so that a seed damages the same place: a path, and a set's order."""
    content = json.loads(file.read_bytes())
    content |= {"base_model_name_or_path": "tiny-llama", "target_modules": sorted(content["target_modules"])}
    return json.dumps(content, indent=2, sort_keys=True).encode()


def damaged(name, good, folder):
    """The case of that name, made in a folder."""
    shutil.copytree(good, folder)
    next(case for case in CASES if case.name == name).make(folder)
    return folder


def of_run(name, tuned_run, folder):
    """A run whose adapter lost or gained what the case says, where the case does not depend on its names."""
    shutil.copytree(tuned_run.folder, folder, ignore=shutil.ignore_patterns(".lock"))  # other tests may have left one
    (folder / "adapter" / "COMPLETE").unlink(
        missing_ok=True
    )  # as older versions left it: nothing says what was written
    next(case for case in CASES if case.name == name).make(folder / "adapter")
    return folder


def test_chat_says_what_is_odd_and_answers(good, cache, tmp_path, monkeypatch):
    folder = damaged("every B zero", good, tmp_path / "zero")
    once = nybble("chat", folder, "--prompt", "one", "--max-new-tokens", 2, cache=cache)
    assert once.status == 0
    assert "adapter   all 6 LoRA modules are zero: it answers like the base" in once.text
    fine = nybble("chat", good, "--prompt", "one", "--max-new-tokens", 2, cache=cache)
    assert "update" not in fine.text, "a script that asks one thing wants the answer"
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    talk = nybble("chat", good, "--max-new-tokens", 2, cache=cache)
    assert talk.status == 0
    assert "adapter   6 LoRA modules, all non-zero" in talk.text
    bad = nybble("chat", damaged("one tensor gone", good, tmp_path / "gone"), "--prompt", "one", cache=cache)
    assert bad.status == 1
    assert "is missing model.layers.1.self_attn.q_proj.lora_B.weight" in " ".join(bad.text.split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("only A", "lora_B"),
        pytest.param("NaN everywhere", "contains NaN or infinity", marks=pytest.mark.slow),
        pytest.param("r str 16", "a whole number", marks=pytest.mark.slow),
        pytest.param("tensors cut off", "cut off", marks=pytest.mark.slow),
        pytest.param("alpha_pattern explodes", "alpha_pattern contains a regular expression", marks=pytest.mark.slow),
        pytest.param("target_modules explodes", "target_modules contains a regular expression", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_damaged_adapter_is_not_measured_nor_exported_nor_trained_on(
    name, said, tuned_run, tiny_llama, rows, cache, tmp_path
):
    folder = of_run(name, tuned_run, tmp_path / "run")
    before = sorted(folder.rglob("*"))
    new = tmp_path / "new"
    train = ("train", tiny_llama, rows, f"adapter={folder / 'adapter'}", f"out={new}", "train.max_steps=1")
    for words in (
        ("chat", folder, "--prompt", "one"),
        ("eval", folder, "--tasks", "none", "--answers", 0),
        ("export", folder, "--to", "adapter"),
        ("export", folder, "--to", "merged"),
        ("serve", folder, "--port", 0),
        (*train, "data.validation=0", "data.max_length=128", "model.device=cpu", "model.dtype=float32"),
    ):
        outcome = nybble(*words, cache=cache)
        print(outcome.text)
        assert outcome.status == 1, words
        assert said in " ".join(outcome.text.split()), words
    assert sorted(folder.rglob("*")) == before, "a failure leaves nothing behind"
    assert not new.exists()


@pytest.mark.slow
def test_training_continues_from_an_adapter_and_names_it(tuned_run, tiny_llama, rows, cache, tmp_path):
    new = tmp_path / "new"
    words = (
        f"adapter={tuned_run.adapter}",
        f"out={new}",
        "train.max_steps=1",
        "data.validation=0",
        "data.max_length=128",
    )
    outcome = nybble("train", tiny_llama, rows, *words, "model.device=cpu", "model.dtype=float32", cache=cache)
    assert outcome.status == 0, outcome.text
    assert f"from {tuned_run.adapter}: 14 LoRA modules, all non-zero" in " ".join(outcome.text.split())


@pytest.mark.slow
def test_only_the_files_that_were_read_are_exported(tuned_run, cache, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tuned_run.folder, folder)
    for name in (PICKLE, f"{TENSORS}.bak", "adapter_notes.txt"):
        (folder / "adapter" / name).write_bytes(b"junk")
    outcome = nybble("export", folder, "--to", "adapter", cache=cache)
    assert outcome.status == 0, outcome.text
    assert "adapter   14 LoRA modules, all non-zero" in outcome.text
    assert {file.name for file in (folder / "export" / "adapter").glob("adapter_*")} == {CONFIG, TENSORS}
