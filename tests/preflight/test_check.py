"""`nybble data check` and `nybble data preview`, as a person runs them."""

from __future__ import annotations

import io
import json
import re

import matplotlib.image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoConfig

from nybble.cli.arguments import data_recipe
from nybble.data import histogram
from nybble.data.rows.licences import licences
from nybble.data.rows.sources import find_sources
from nybble.data.sets.prepare import prepare
from nybble.data.sets.preview import preview
from nybble.errors import DataError
from nybble.plan.speed import BURSTS, estimate, product_rates
from nybble.preflight.data_check import check
from nybble.recipe import DataOptions, load_recipe
from nybble.training.messages import print_data
from tests.conftest import SHARED


def looked(data, model, *words: str, **more) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=100)
    recipe = load_recipe(None, [f"data.path={data}", f"model.path='{model}'", "model.device=cpu", *words])
    fit = check(recipe, console, **more)
    print(console.file.getvalue())
    return fit, console.file.getvalue()


def test_a_fit_set_is_reported_with_all_its_numbers(rows, tiny_llama, cache, tmp_path):
    words = [
        "data.max_length=256",
        "data.packing=true",
        "train.micro_batch=1",
        "train.accumulation=2",
        "data.validation=8",
    ]
    fit, told = looked(rows, tiny_llama, *words, picture=tmp_path / "new" / "h.png", cache=cache)
    assert fit
    for pattern in (
        r"rows +80: 80 alpaca",
        r"duplicates +0",
        r"bad rows +0",
        r"template +alpaca; <s> once per row",
        r"tokens +[\d,]+, [\d,]+ of them trained \(\d+%\)",
        r"lengths +\d+ to \d+ tokens; median \d+, 95% up to \d+",
        r"batches +checked as in training: every answer ends with a trained </s>, BOS is in place",
        r"packing +72 rows in \d+ of 256 tokens, [\d.]+% full",
        r"training +\d+ steps of 2 rows \(micro batch 1, accumulation 2\), about [\d,]+ tokens\n",
        r"time +roughly (a second|[\d.]+ (seconds|minutes)) on this machine's cpu.*: [\d,]+ tokens/s in training, estimated from",
        r"\nready to train\n",
    ):
        assert re.search(pattern, told), pattern
    assert matplotlib.image.imread(tmp_path / "new" / "h.png").shape[:2] == (480, 960)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.micro_batch=2", "train.accumulation=20"],
         r"2 steps teach little: a step every 2 rows \(train\.accumulation=1\), or more passes \(train\.epochs=30\)\n"),
        (["train.micro_batch=40", "train.accumulation=1"], r"2 steps teach little: more passes \(train\.epochs=30\)\n"),
        (["train.micro_batch=80", "train.accumulation=1", "train.epochs=19"], r"19 steps teach little: .*=60\)\n"),
        (["train.micro_batch=80", "train.accumulation=1", "train.epochs=20"], None),
        (["train.micro_batch=40", "train.accumulation=1", "train.max_steps=2"], None),
    ],
)  # fmt: skip
def test_few_steps_are_said(words, told, rows, tiny_llama, cache):
    fit, said = looked(rows, tiny_llama, "data.max_length=256", "data.validation=0", *words, cache=cache)
    assert fit
    flat = re.sub(r"\n {8,}", " ", said)
    assert re.search(told, flat) if told else "teach little" not in said


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([1e9] * 6, r"roughly [\da.]+ \w+ on this machine's cpu: [\d,]+ tokens/s in training"),
        ([2e8, 1e9, 3e8, 2e8, 2e8, 2e8], r"roughly [\d.]+ \w+ on .* cpu when idle, [\d.]+ \w+ under its current load"),
    ],
)  # fmt: skip
def test_the_time_is_estimated_for_an_idle_and_for_a_busy_machine(rates, told, rows, tiny_llama, cache, monkeypatch):
    # Measured twice, they would differ where another program starts in between.
    monkeypatch.setattr("nybble.plan.speed.product_rates", lambda *machine: rates)
    words = ["data.max_length=256", "train.micro_batch=1", "train.max_steps=1000"]
    _, said = looked(rows, tiny_llama, *words, cache=cache)
    assert re.search(f"time +{told}", said)
    assert "estimated from matrix products; evaluations are included, sample answers and benchmarks are not" in said


def test_the_speed_of_a_machine_is_measured_at_several_moments(tiny_llama, monkeypatch):
    config, device = AutoConfig.from_pretrained(tiny_llama), torch.device("cpu")
    found = product_rates(device, torch.float32)
    assert len(found) == BURSTS
    assert all(1e8 < rate < 1e14 for rate in found), found
    monkeypatch.setattr("nybble.plan.speed.product_rates", lambda *_: found)
    one, two = (estimate(config, device, torch.float32, processes) for processes in (1, 2))
    assert 0 < one.current <= one.idle
    assert two == one, "processes share a CPU"


def test_a_warm_up_that_covers_the_run_is_reported(rows, tiny_llama, cache):
    _, told = looked(rows, tiny_llama, "data.max_length=256", "train.max_steps=20", "train.warmup=50", cache=cache)
    assert "train.warmup=50 covers all 20 steps: the warm-up is shortened to 2 steps" in told


def test_weighted_rows_are_packed_as_often_as_they_are_used(rows, tiny_llama, cache):
    words = ["data.max_length=256", "data.packing=true", "data.validation=0", "train.micro_batch=1"]
    _, told = looked(f"{{{rows}: 2}}", tiny_llama, *words, cache=cache)
    assert re.search(r"packing +160 rows in \d+ of 256 tokens", told)


def test_an_unfit_set_has_every_fault_named(tmp_path, tiny_llama, cache):
    rows = [{"prompt": "red " * 100, "completion": "one " * (n + 1)} for n in range(40)]
    rows += [{"prompt": "x", "completion": ""}] * 2 + [rows[0]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    fit, told = looked(
        file, tiny_llama, "data.max_length=128", "train.micro_batch=1", "train.accumulation=1", cache=cache
    )
    assert not fit
    assert "bad rows   3 (2 because of an empty answer)" in told
    assert "duplicates 1, each row used once" in told
    assert f"{file}, lines 41 to 42: a row without an answer: 'completion' is empty" in told
    assert f"{file}:44: not valid JSON" in told
    assert re.search(r"too long +\d+ rows over data.max_length=128; truncating loses [\d,]+ answer tokens", told)
    assert "data.overlength=truncate" in told
    assert "not ready: fix the 2 problems above" in told


def test_a_file_of_validation_rows_is_looked_at_too(rows, tiny_llama, tiny_tokenizer, cache, tmp_path):
    words = ["data.max_length=256", f"data.validation={tmp_path / 'held.jsonl'}"]
    fit, told = looked(rows, tiny_llama, *words, cache=cache)
    assert not fit
    assert f"there is no file {tmp_path / 'held.jsonl'}" in told
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}) + '\n{"instruction": "a", "output": ""}\n')
    fit, told = looked(rows, tiny_llama, *words, cache=cache)
    assert not fit
    assert f"where: {tmp_path / 'held.jsonl'}:2" in told
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}))
    fit, told = looked(rows, tiny_llama, *words, cache=cache)
    assert fit
    assert f"validation 1 row of {tmp_path / 'held.jsonl'}, 1 used" in told
    options = DataOptions(path=str(rows), max_length=256, validation=str(tmp_path / "held.jsonl"))
    held_out = prepare(options, tiny_tokenizer, 0, cache).validation
    assert "### Instruction:\nred" in tiny_tokenizer.decode(held_out[0]["input_ids"]), "in the template that is trained"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.max_length=513", "data.max_length=513 is above the model's 512 positions"),
        ("train.save_every=2", "train.save_every=2 differs from the 1 steps between evaluations"),
        ("train.micro_batch=100", "one step takes 400"),
    ],
)
def test_what_train_would_refuse_is_not_ready(rows, tiny_llama, cache, word, message):
    fit, told = looked(rows, tiny_llama, "data.max_length=256", word, cache=cache)
    assert not fit
    assert message in told


def test_what_splitting_loses_is_reported(tmp_path, tiny_llama, cache):
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "one two " * 6}] * 4
    rows = [{"messages": turns}, {"prompt": "red", "completion": "one " * 200}, {"prompt": "red", "completion": "two"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.max_length=64", "data.overlength=split", "data.validation=0"]
    _, told = looked(file, tiny_llama, *words, "train.micro_batch=1", "train.accumulation=1", cache=cache)
    lost = re.search(r"2 rows over data.max_length=64; splitting loses (\d+) answer tokens, with 1 row left", told)
    assert lost[1] == "401", "the long answer with its EOS, and nothing of the chat"


def test_how_rows_were_read_is_reported(tmp_path, tiny_llama, tiny_tokenizer, cache):
    file = tmp_path / "a.csv"
    file.write_text("sep=;\nInstruction;output;\n" + "".join(f"{n};{n};\n" for n in range(40)) + ";;\n")
    for model in ("", tiny_llama):
        _, told = looked(file, model, "data.max_length=256", cache=cache)
        for notice in ("a.csv: empty columns at the end are ignored", "a.csv: empty rows are ignored", "(40 rows)"):
            assert re.search(rf"notice     .*{re.escape(notice)}", told), notice
    options, console = DataOptions(path=str(file), max_length=256), Console(file=io.StringIO(), width=200)
    print_data(console, prepare(options, tiny_tokenizer, 0, cache), options, 1.0)
    assert "a.csv: empty rows are ignored" in console.file.getvalue(), "as train tells it"


def test_a_broken_line_is_not_followed_by_complaints_about_the_rows_that_are_left(tmp_path, tiny_llama, cache):
    """One good row is too few to hold any out or to fill a step; once the other lines are mended it may not be."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' + '{"instruction": "b"\n' * 3)
    fit, told = looked(file, tiny_llama, "data.max_length=256", cache=cache)
    assert not fit
    assert f"{file}, lines 2 to 4: not valid JSON" in told
    assert "not ready: fix the 1 problem above" in told
    assert "leaves none to train on" not in told
    _, told = looked(file, tiny_llama, "data.max_length=256", "data.validation=0", cache=cache)
    assert "one step takes" not in told
    assert "not ready: fix the 1 problem above" in told
    _, told = looked(file, tiny_llama, "data.max_length=256", "data.bad_rows=drop", cache=cache)
    assert "leaves none to train on" in told, "where the others are left out for good, it is a fault"


def test_without_a_model_the_rows_are_read(rows, tmp_path):
    fit, told = looked(rows, "")
    assert fit
    assert "rows       80: 80 alpaca" in told
    assert "add MODEL to check tokens" in told
    with pytest.raises(DataError, match="--png needs a model: lengths are counted in its tokens"):
        looked(rows, "", picture=tmp_path / "h.png")
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n')
    fit, told = looked(file, "")
    assert not fit
    assert f"where: {file}:1" in told


@pytest.mark.parametrize("with_model", [False, True])
def test_of_a_stream_the_beginning_is_looked_at(rows, tiny_llama, cache, monkeypatch, with_model):
    monkeypatch.setattr("nybble.data.rows.reading.STREAM_HEAD", 50)
    words = ["data.streaming=true", "train.max_steps=2", "data.validation=0", "data.max_length=256"]
    fit, told = looked(rows, tiny_llama if with_model else "", *words, cache=cache)
    assert fit
    assert "rows       50, the first of a stream: 50 alpaca" in told


@pytest.mark.parametrize("name", ["*.jsonl", "[ab].jsonl", "my: rows.jsonl", "2024-01-01", "007", "a #1.jsonl"])
def test_a_name_on_the_command_line_is_used_literally(name):
    recipe = data_recipe([name, "my/*", "data.max_length=64"], None)
    assert (recipe.data.path, recipe.model.path, recipe.data.max_length) == (name, "my/*", 64)
    if not name.startswith("["):  # which begins a list
        assert data_recipe([f"data.path={name}"], None).data.path == name


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    "name",
    [
        "alpaca_en_demo.json",
        "oasst_en_chats.jsonl",
        pytest.param("dolly_open_qa.jsonl", marks=pytest.mark.slow),  # test_data.py packs it in the fast suite
        pytest.param("instruct_mix.jsonl", marks=pytest.mark.slow),
    ],
)
def test_real_sets_are_fit_and_pack_nearly_full(name, cache):
    file, tokenizer = SHARED / "train" / name, SHARED / "llama2-tokenizer"
    fit, told = looked(file, tokenizer, "data.max_length=2048", "data.packing=true", "data.validation=0", cache=cache)
    assert fit
    filled = float(re.search(r"([\d.]+)% full", told)[1])
    assert filled > (99.5 if name == "instruct_mix.jsonl" else 97)


def shown(data, tokenizer, *, colour: bool = False, options: dict | None = None, **more) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=colour, color_system="standard" if colour else None)
    preview(DataOptions(path=str(data), **(options or {})), tokenizer, 1, console, **more)
    print(console.file.getvalue())
    return console.file.getvalue()


def test_a_preview_shows_the_text_the_mask_and_the_control_tokens(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "red [bold] </s>", "output": "blue"}\n')
    told = shown(file, tiny_tokenizer)
    assert "<s>Below is an instruction" in told
    assert "### Instruction:\nred [bold] </s>\n\n### Response:\n[[blue]][[</s>]]" in told
    assert re.search(rf"{file}:1: \d+ tokens, \d trained", told)
    coloured = shown(file, tiny_tokenizer, colour=True)
    assert "[[" not in coloured
    assert re.search(r"\x1b\[1;32mblue\x1b\[0m\x1b\[1;7;32m</s>\x1b\[0m", coloured)
    listed = shown(file, tiny_tokenizer, ids=True)
    assert "[[2 </s>]]" in listed


def test_a_preview_without_a_row_says_why(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "red", "output": ""}\n')
    with pytest.raises(DataError, match="a row without an answer"):
        shown(file, tiny_tokenizer)


def test_a_preview_reads_rows_as_large_as_the_options_allow(tmp_path, tiny_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"instruction": "red", "output": "blue", "note": "x" * 1_200_000}) + "\n")
    assert "[[blue]]" in shown(file, tiny_tokenizer, options={"max_row_mb": 2})
    with pytest.raises(DataError, match=r"a line of 1\.2 MB"):
        shown(file, tiny_tokenizer, options={"max_row_mb": 1})


@given(st.dictionaries(st.integers(1, 5000), st.integers(1, 50), min_size=1, max_size=60))
def test_a_histogram_counts_every_row_once(lengths):
    found = histogram.bins(lengths)
    assert sum(rows for *_, rows in found) == sum(lengths.values())
    assert len(found) <= 16
    assert all(first <= last for first, last, _ in found)
    assert [line for line, _ in histogram.text(lengths, 100, "#")]


def test_the_licence_of_a_known_set_is_named(tmp_path):
    (tmp_path / "alpaca_data.json").write_text("[]")
    assert licences(find_sources(str(tmp_path / "alpaca_data.json"))) == [
        "alpaca_data.json: CC BY-NC 4.0: not for commercial use (Stanford Alpaca)"
    ]
    assert licences(find_sources("tatsu-lab/alpaca")) == ["tatsu-lab/alpaca: CC BY-NC 4.0: not for commercial use"]
