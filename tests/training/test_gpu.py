"""On a CUDA device: the same main job, with the paged 8-bit optimiser, in bfloat16 and float16."""

from __future__ import annotations

import gc
import io
import json

import pytest
import torch
from rich.console import Console

from nybble.recipe import load_recipe
from nybble.run.folder import open_run
from nybble.training.train import train
from tests.cli.test_cli import nybble
from tests.conftest import small_tokenizer, write_llama
from tests.training.test_train import losses

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_memory():
    """What other tests of this process left with the allocator would count as reserved."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_on_the_gpu_lowers_the_loss(tiny_llama, rows, cache, tmp_path, quiet, dtype, packing):
    words = [f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / 'run'}", f"model.dtype={dtype}"]
    words += ["data.max_length=128", f"data.packing={packing}", "data.validation=8", "train.micro_batch=2"]
    words += ["train.accumulation=2", "train.max_steps=24", "train.learning_rate=1e-2", "train.samples=1"]
    run = train(load_recipe(None, words), console=quiet, cache=cache)
    summary = json.loads((run.folder / "summary.json").read_text())
    print(summary["validation_loss"], summary["peak_memory_gb"])
    assert summary["device"] == torch.cuda.get_device_name()
    assert summary["validation_loss"]["kept"] < summary["validation_loss"]["before"] - 0.2  # 0.24 packed, 0.31 not
    assert 0 < summary["peak_memory_gb"] < 1
    assert len(losses(run)) == 24


def test_gpu_and_cpu_agree(tiny_llama, rows, cache, tmp_path, quiet):
    runs = []
    for device in ("cpu", "cuda"):
        words = [f"model.path={tiny_llama}", f"data.path={rows}", f"out={tmp_path / device}", f"model.device={device}"]
        words += ["model.dtype=float32", "data.max_length=256", "train.max_steps=4", "train.optimizer=adamw"]
        runs.append(train(load_recipe(None, words), console=quiet, cache=cache))
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-3)


def test_what_does_not_fit_is_one_message_with_the_cheapest_fix(tiny_llama, rows, tmp_path):
    """In a process of its own, where no other test has left memory that is free but reserved."""
    code = "import torch; torch.cuda.set_per_process_memory_fraction(1e-6); from nybble.cli import main; main()"
    words = [tiny_llama, rows, f"out={tmp_path / 'run'}", "data.max_length=256"]
    result = nybble("train", *words, launcher=("-c", code), home=tmp_path)
    print(result.stderr)
    assert result.returncode == 1
    assert "the GPU does not have enough memory" in result.stderr
    assert "train.micro_batch=2 train.accumulation=8" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_that_does_not_fit_is_halved(rows, cache, tmp_path):
    """On a device that has as much memory as lies between the peaks of both."""
    model = write_llama(tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    small_tokenizer().save_pretrained(model)
    words = [f"model.path={model}", f"data.path={rows}", "data.max_length=256", "data.validation=8", "train.samples=0"]
    words += ["train.max_steps=4", "train.evaluate_every=2", "engine.policy=keep-all"]
    sizes = {32: ["train.micro_batch=32", "train.accumulation=1"], 16: ["train.micro_batch=16", "train.accumulation=2"]}
    peaks = {}
    for size, split in sizes.items():
        run = train(
            load_recipe(None, [*words, *split, f"out={tmp_path / str(size)}"]), console=Console(quiet=True), cache=cache
        )
        peaks[size] = json.loads((run.folder / "summary.json").read_text())["peak_memory_gb"] * 1e9
        gc.collect()
        torch.cuda.empty_cache()
    limit = sum(peaks.values()) / 2
    print(peaks, limit)
    assert peaks[32] > 1.2 * peaks[16]
    console = Console(file=io.StringIO(), width=200)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        run = train(load_recipe(None, [*words, *sizes[32], f"out={tmp_path / 'run'}"]), console=console, cache=cache)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(console.file.getvalue())
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["micro_batch"], summary["halved_from"]) == (16, 32)
    assert summary["peak_memory_gb"] * 1e9 < limit
    assert losses(run) == pytest.approx(losses(open_run(tmp_path / "16")), rel=1e-3)


def test_more_processes_than_gpus_is_one_message(tiny_llama, rows, tmp_path):
    count = torch.cuda.device_count() + 1
    words = [tiny_llama, rows, f"out={tmp_path / 'run'}", "data.max_length=256", "--processes", count]
    result = nybble("train", *words, home=tmp_path)
    print(result.stderr)
    assert result.returncode == 1
    assert "has no GPU of its own" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [(), ("engine.policy=host",), ("engine.weights=host",), ("train.vram=1GB",)], ids=str)
def test_the_plan_is_kept_with_what_was_reserved(tiny_llama, rows, tmp_path, words):
    """In a process of its own: what other tests left with the allocator would count."""
    options = [
        tiny_llama,
        rows,
        f"out={tmp_path / 'run'}",
        "data.max_length=128",
        "train.max_steps=4",
        "train.samples=0",
        *words,
    ]
    result = nybble("train", *options, home=tmp_path)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert "\nmemory    " in result.stdout
    assert " GB planned (" in result.stdout
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert memory["measured_gb"] < 1
    assert memory["predicted_gb"] < 1, "the model is tiny; how right plans are is measured by larger ones"
