"""The main job on a tiny Llama: what a run leaves, what it guards against, how it fails."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import io
import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import nybble.training.loop as loop
import nybble.training.preparation as preparation
import nybble.training.samples as samples
import nybble.training.train as training
from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.data.batches import Collator
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.engine import compute
from nybble.engine.fuse import fuse
from nybble.errors import (
    DataError,
    EngineError,
    ModelError,
    NybbleError,
    RecipeError,
    RunError,
    StorageError,
    TrainingError,
)
from nybble.plan.out_of_memory import explained_memory, memory_saving_change
from nybble.plan.shapes import LLAMA_2_7B
from nybble.recipe import Recipe, load_recipe
from nybble.run.folder import Run, open_run
from nybble.run.log import read_metrics
from nybble.training.samples import SampleAnswers
from nybble.training.train import resume, train
from nybble.training.trainer import CurrentStep
from nybble.weights.frozen import linear4bits

FAST = [
    "model.device=cpu",
    "model.dtype=float32",
    "data.max_length=256",
    "data.validation=8",
    "train.micro_batch=4",
    "train.accumulation=2",
    "train.samples=1",
]


UNASKED = "train.samples=0"
"""For what has nothing to do with samples: those of one evaluation take as long as ten steps."""


def recipe_for(model, data, out, *words: str) -> Recipe:
    return load_recipe(None, [f"model.path={model}", f"data.path={data}", f"out={out}", *FAST, *words])


def losses(run: Run) -> list[float]:
    return [line.loss for line in read_metrics(run) if line.loss is not None]


def adapter_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_llama, rows, cache, tmp_path_factory) -> Run:
    """A short run, shared by the tests that only look at one."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    recipe = recipe_for(
        tiny_llama, rows, out, "train.max_steps=12", "train.learning_rate=5e-3", "train.evaluate_every=4"
    )
    return train(recipe, console=Console(quiet=True), cache=cache)


def test_a_run_writes_all_its_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        *("recipe.yaml", "start.json", "template.json", "tokenizer", "checkpoints", "metrics.jsonl", "samples.jsonl"),
        *("adapter", "summary.json", "loss.png", "README.md"),
    }
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["validation_loss"]["kept"] < summary["validation_loss"]["before"]
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(summary["base"]["fingerprint"]) == len("sha256:") + 64
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_gb"] > 0.1
    assert len(losses(finished)) == 12
    assert [line.step for line in read_metrics(finished) if line.eval_loss is not None] == [0, 4, 8, 12]
    answers = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in answers] == [4, 8, 12], "on a CPU none before the first step"
    assert answers[0]["prompt"].endswith("### Response:\n")
    assert answers[0]["expected"].endswith("</s>")
    assert (finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in (finished.folder / "README.md").read_text()
    assert open_run(finished.folder).recipe == finished.recipe


def test_the_adapter_loads_with_plain_peft(finished, tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, finished.adapter)
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    saved = adapter_of(finished)
    live = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(live[name], tensor) for name, tensor in saved.items())


def test_the_best_adapter_is_kept_and_every_checkpoint_is_complete(finished):
    checkpoints = sorted(path.name for path in finished.checkpoints.iterdir())
    assert all((finished.checkpoints / name / "COMPLETE").exists() for name in checkpoints)
    evaluations = {line.step: line.eval_loss for line in read_metrics(finished) if line.eval_loss}
    best = min((step for step in evaluations if step), key=evaluations.__getitem__)
    kept = load_file(finished.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapter_of(finished).items())


def test_chat_sends_the_ids_that_were_trained_and_stops_by_itself(finished, cache, rows):
    answerer = load_answerer(finished, cache)
    row = json.loads(rows.read_text().splitlines()[0])
    asked = (Message("user", row["instruction"]),)
    prompt = encode_prompt(answerer.template, asked)
    from nybble.data.text.tokens import encode

    (trained,) = encode(answerer.template, [(*asked, Message("assistant", row["output"]))])
    assert trained.ids[: len(prompt)] == prompt
    assert trained.trained.index(True) == len(prompt)
    one = answerer.answer([asked], Sampling(max_new_tokens=12))
    both = answerer.answer([asked, (Message("user", "say"),)], Sampling(max_new_tokens=12))
    assert both[0] == one[0], "padding on the left changed an answer"
    with answerer.as_base():
        base = answerer.answer([asked], Sampling(max_new_tokens=12))
    assert base != one
    assert one == answerer.answer([asked], Sampling(max_new_tokens=12)), "the adapter is on again"


def test_accumulation_is_normalised_by_trained_tokens(tiny_llama, rows, cache, tmp_path, quiet):
    """1 x 8 equals 8 x 1 although the rows differ in length."""
    runs = [
        train(
            recipe_for(tiny_llama, rows, tmp_path / name, *words, "train.max_steps=4", "train.learning_rate=1e-3"),
            console=quiet,
            cache=cache,
        )
        for name, words in {
            "wide": ["train.micro_batch=8", "train.accumulation=1", UNASKED],
            "deep": ["train.micro_batch=1", "train.accumulation=8", UNASKED],
        }.items()
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    for name, tensor in adapter_of(runs[0]).items():
        torch.testing.assert_close(tensor, adapter_of(runs[1])[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "words",
    [
        ["data.packing=true", "data.max_length=128", "train.micro_batch=1"],
        ["train.neftune_alpha=5", "train.scheduler=constant", "lora.dropout=0.1"],
        ["data.validation=0", "train.warmup=2", "train.gradient_checkpointing=false"],
        ["model.quantization=none", "lora.dora=true", "train.scheduler=linear", "data.train_on=all"],
        ["model.rope_scaling={rope_type: linear, factor: 2.0}", "data.max_length=800", "train.keep_best=false"],
        ["data.template=llama2", "model.dtype=bfloat16", "train.epochs=0.2"],
    ],
    ids=lambda words: words[0],
)
def test_options_train(tiny_llama, rows, cache, tmp_path, quiet, words):
    steps = [] if "train.epochs=0.2" in words else ["train.max_steps=3"]
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words, *steps), console=quiet, cache=cache)
    assert len(losses(run)) in (2, 3)
    assert all(map(math.isfinite, losses(run)))


def test_the_run_says_how_its_layers_are_computed(tiny_llama, rows, cache, tmp_path, capsys):
    told = {}
    for name, words in {
        "fused": ["engine.policy=drop-mlp"],
        "plain": ["engine.fused=false"],
        "DoRA": ["lora.dora=true"],
    }.items():
        train(recipe_for(tiny_llama, rows, tmp_path / name, *words, "train.max_steps=2", UNASKED), cache=cache)
        told[name] = capsys.readouterr().out
    assert "engine    2 of 2 decoder layers fused; plain torch: Triton's kernels do not run on cpu" in told["fused"]
    assert "engine    Transformers computes the layers: engine.fused=false" in told["plain"]
    assert "q_proj has the LoRA variant Dora" in told["DoRA"]


def test_a_requested_engine_that_is_not_possible_is_refused(tiny_llama, rows, cache, tmp_path, quiet):
    words = ["model.quantization=int8", "engine.policy=host", "train.max_steps=2"]
    with pytest.raises(EngineError) as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=quiet, cache=cache)
    print(caught.value)
    assert "none of 2 decoder layers can be fused: q_proj is a" in str(caught.value)
    assert "leave engine.policy, embedding, weights and compute out" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a run on a CPU")
def test_weights_on_the_host_of_a_cpu_are_refused(tiny_llama, rows, cache, tmp_path, quiet):
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", "model.device=auto", "engine.weights=host")
    with pytest.raises(EngineError, match="the model is on a CPU: its weights are on the host already") as caught:
        train(recipe, console=quiet, cache=cache)
    assert "engine.weights=device" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a run on a CPU")
def test_fp8_on_a_cpu_is_refused_and_if_possible_it_falls_back_and_says_so(tiny_llama, rows, cache, tmp_path, capsys):
    words = ["model.device=auto", "model.dtype=auto", "train.max_steps=2", UNASKED]
    with pytest.raises(EngineError, match="cannot be computed in fp8: cpu has no fp8 units") as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "run", *words, "engine.compute=fp8"), cache=cache)
    print(caught.value)
    assert "engine.compute" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words, "engine.compute=fp8-if-possible"), cache=cache)
    assert "computed in 16 bits, not in fp8: cpu has no fp8 units" in capsys.readouterr().out
    assert run.summary().products == run.summary().dtype


def test_a_run_records_that_it_was_trained_in_fp8_and_is_evaluated_in_16_bits(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    monkeypatch.setattr(compute, "missing", lambda device: "")  # on a CPU its reference computes it
    words = ["model.device=auto", "model.dtype=auto", "train.max_steps=3", "train.learning_rate=5e-3", UNASKED]
    runs = {
        name: train(recipe_for(tiny_llama, rows, tmp_path / name, *words, *more), console=quiet, cache=cache)
        for name, more in {
            "fp8": ["engine.compute=fp8", "engine.fp8_skip=down_proj"],
            "bf16": [],
        }.items()
    }
    assert runs["fp8"].summary().products == "fp8 (fast sums: forward and backward; in 16 bits: down_proj)"
    assert runs["bf16"].summary().products == runs["bf16"].summary().dtype
    before = [run.summary().validation_loss.before for run in runs.values()]
    assert before[0] == before[1], "the same model is evaluated in the same way"
    assert runs["fp8"].summary().train_loss != runs["bf16"].summary().train_loss
    assert runs["fp8"].summary().train_loss == pytest.approx(runs["bf16"].summary().train_loss, abs=0.05)


def test_training_continues_from_an_adapter(finished, tiny_llama, rows, cache, tmp_path, quiet):
    words = [f"adapter={finished.adapter}", "train.max_steps=2", "train.learning_rate=1e-9", UNASKED]
    run = train(recipe_for(tiny_llama, rows, tmp_path / "more", *words), console=quiet, cache=cache)
    before = json.loads((run.folder / "summary.json").read_text())["validation_loss"]["before"]
    best = json.loads((finished.folder / "summary.json").read_text())["validation_loss"]["kept"]
    assert before == pytest.approx(best, abs=1e-4)


def test_early_stopping_stops(tiny_llama, rows, cache, tmp_path, quiet):
    words = ["train.early_stopping=1", "train.evaluate_every=1", "train.learning_rate=10", "train.max_steps=20"]
    words.append("train.warmup=0")  # or the best is the first step's adapter, which has learnt nothing
    words.append(UNASKED)
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=quiet, cache=cache)
    assert len(losses(run)) < 20
    assert json.loads((run.folder / "summary.json").read_text())["steps"] == len(losses(run))


def test_a_non_finite_loss_stops_before_the_optimiser_with_the_batch_saved(tiny_llama, rows, cache, tmp_path, quiet):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tiny_llama, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["lm_head.weight"][7] = 1e38  # finite, as a base must be, and its products are not
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError) as caught:
        train(recipe_for(poisoned, rows, tmp_path / "run", "train.max_steps=3"), console=quiet, cache=cache)
    print(caught.value)
    assert "the loss of step 1 is not finite" in str(caught.value)
    kept = torch.load(tmp_path / "run" / "nonfinite-step-1.pt", weights_only=True)
    assert len(kept["batches"][0]["cu_seq_lens_q"]) == 4 + 1, "the rows of a micro batch"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": "nan"' in lines, "filtered out of the log"


FAULTS = {
    "small": (["train.micro_batch=64"], DataError, "72 training rows, but one step takes 128"),
    "over length": (["data.max_length=8"], DataError, "rows are longer than"),
    "positions": (["data.max_length=5000"], ModelError, "above the model's 512 positions"),
    "model": (["model.path=/nowhere/model"], ModelError, "there is no folder /nowhere/model"),
    "targets": (["lora.targets=[query]"], ModelError, "no linear layer named query"),
    "adapter": (["adapter=/nowhere/adapter"], ModelError, "there is no adapter in"),
    "gpu": (["model.device=cuda"], NybbleError, "finds no CUDA device"),
    "saving": (["train.evaluate_every=2", "train.save_every=4"], RecipeError, "differs from the 2 steps"),
    "tracker": (["tracker.to=trackio"], RecipeError, "the package is not installed"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_before_the_first_step_leaves_no_run(kind, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    words, error, message = FAULTS[kind]
    if kind == "gpu" and torch.cuda.is_available():
        pytest.skip("there is one")
    if kind == "tracker":
        monkeypatch.setattr("nybble.training.trackers.find_spec", lambda name: None)
    with pytest.raises(error) as caught:
        train(recipe_for(tiny_llama, rows, tmp_path / "runs" / "run", *words), console=quiet, cache=cache)
    print(caught.value)
    assert message in str(caught.value)
    assert caught.value.fix or caught.value.where
    assert not list(tmp_path.glob("runs/*"))


def test_a_tokenizer_of_another_model_is_refused(tiny_llama, rows, cache, tmp_path, quiet):
    from tests.conftest import write_llama

    small = write_llama(tmp_path / "small", vocab_size=50)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, small)
    with pytest.raises(ModelError, match="but the model has embeddings for ids 0 to 49"):
        train(recipe_for(small, rows, tmp_path / "run"), console=quiet, cache=cache)


def test_an_existing_run_and_a_finished_one_are_left_alone(finished, tiny_llama, rows, cache, quiet):
    stamp = (finished.folder / "summary.json").stat().st_mtime_ns
    with pytest.raises(RunError, match="exists already") as caught:
        train(recipe_for(tiny_llama, rows, finished.folder), console=quiet, cache=cache)
    print(caught.value)
    with pytest.raises(RunError, match="there is nothing to resume"):
        resume(finished.folder, console=quiet, cache=cache)
    assert (finished.folder / "summary.json").stat().st_mtime_ns == stamp


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(monkeypatch, step: int, recipe: Recipe, quiet, cache) -> None:
    class Interrupted(loop.QLoraTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Interrupt(step))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "QLoraTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, console=quiet, cache=cache)


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw_8bit"])
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    optimizer, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    words = ["train.max_steps=10", "train.evaluate_every=3", "lora.dropout=0.2", "train.learning_rate=1e-3"]
    words.append(f"train.optimizer={optimizer}")
    whole = train(recipe_for(tiny_llama, rows, tmp_path / "whole", *words), console=quiet, cache=cache)
    recipe = recipe_for(tiny_llama, rows, tmp_path / "cut", *words)
    interrupted(monkeypatch, 5, recipe, quiet, cache)
    cut = open_run(tmp_path / "cut")
    assert cut.latest_checkpoint().name == "checkpoint-3"
    half = cut.checkpoints / "checkpoint-6"  # as a kill in the middle of a save leaves it
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with cut.metrics.open("a") as stream:
        stream.write('{"step": 6, "lo')
    resume(cut.folder, console=quiet, cache=cache)
    assert read_metrics_but_time(cut) == read_metrics_but_time(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(cut).items())


@pytest.mark.parametrize("words", [["train.max_steps=8"], ["train.max_steps=20", "train.early_stopping=1"]])
def test_a_run_that_failed_after_its_last_step_does_no_other_step(
    words, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    """Its adapter is that of the best step, which is not the last, wherever the run is by now."""
    words = [
        *words,
        "train.evaluate_every=2",
        "train.learning_rate=0.1",
        "train.scheduler=constant",
        UNASKED,
        "train.seed=2",
    ]
    whole = train(recipe_for(tiny_llama, rows, tmp_path / "whole", *words), console=quiet, cache=cache)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_adapter", full_disk)
        with pytest.raises(StorageError, match="the disk is full"):
            train(recipe_for(tiny_llama, rows, "cut", *words), console=quiet, cache=cache)
    cut = open_run((tmp_path / "cut").rename(tmp_path / "moved"))
    resume(cut.folder, console=quiet, cache=cache)
    assert read_metrics_but_time(cut) == read_metrics_but_time(whole)
    assert all(torch.equal(tensor, adapter_of(whole)[name]) for name, tensor in adapter_of(cut).items())
    kept, steps = (json.loads((cut.folder / "summary.json").read_text())[name] for name in ("kept_step", "steps"))
    assert kept == json.loads((whole.folder / "summary.json").read_text())["kept_step"] < steps


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_metrics_but_time(run: Run) -> list[dict]:
    return [line.model_dump(exclude_unset=True, exclude={"seconds"}) for line in read_metrics(run)]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_resumed(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", "train.max_steps=6", "train.evaluate_every=2", UNASKED)
    interrupted(monkeypatch, 5, recipe, quiet, cache)
    (open_run(tmp_path / "run").latest_checkpoint() / "optimizer.pt").unlink()
    console = Console(file=io.StringIO(), width=200)
    run = resume(tmp_path / "run", console=console, cache=cache)
    told = console.file.getvalue()
    print(told)
    assert "checkpoint-4: there is no optimizer.pt; it is now set-aside-checkpoint-4" in told
    assert "resuming from checkpoint-2" in told
    assert run.adapter.is_dir()
    assert (run.checkpoints / "set-aside-checkpoint-4" / "scheduler.pt").is_file()


def test_a_run_that_stops_at_once_before_the_first_checkpoint_leaves_nothing(
    tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    interrupted(monkeypatch, 1, recipe_for(tiny_llama, rows, tmp_path / "runs" / "cut"), quiet, cache)
    assert not list(tmp_path.glob("runs/*"))


def test_resume_refuses_what_changed(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    words = ["train.max_steps=6", "train.evaluate_every=2", "data.form=alpaca"]
    interrupted(monkeypatch, 3, recipe_for(tiny_llama, data, tmp_path / "cut", *words), quiet, cache)
    file = tmp_path / "cut" / "recipe.yaml"
    start = tmp_path / "cut" / "start.json"
    good_recipe, good_start = file.read_text(), start.read_text()

    def refused() -> str:
        with pytest.raises(RunError) as caught:
            resume(tmp_path / "cut", console=quiet, cache=cache)
        print(caught.value)
        return str(caught.value)

    file.write_text(good_recipe.replace("learning_rate: 0.0002", "learning_rate: 0.001"))
    assert "train.learning_rate: 0.0002 -> 0.001" in refused()
    file.write_text(good_recipe)
    torch_version = importlib.metadata.version("torch")
    start.write_text(good_start.replace(f'"torch": "{torch_version}"', '"torch": "1.0"'))
    assert f"versions.torch: '1.0' -> '{torch_version}'" in refused()
    start.write_text(good_start)
    data.write_text(data.read_text().replace("say", "tell", 1))
    assert "data: " in refused()


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_is_one_message(tiny_llama, rows, cache, tmp_path, quiet):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(RunError) as caught:
            train(recipe_for(tiny_llama, rows, disk / "run"), console=quiet, cache=cache)
        print(caught.value)
        assert "GB are free" in str(caught.value)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_is_neither_run_nor_adapter_is_named(tmp_path):
    with pytest.raises(RunError, match="is neither a run nor an adapter"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="there is no folder"):
        open_run(tmp_path / "none")


def test_an_adapter_without_a_run_answers_and_its_moved_base_is_found(finished, tiny_llama, cache, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(finished.adapter, bare, ignore=shutil.ignore_patterns("COMPLETE"))  # somebody else writes none
    moved = tmp_path / "moved"
    shutil.copytree(tiny_llama, moved)
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(ModelError, match="there is no folder /gone/base"):
        load_answerer(open_run(bare), cache)
    answerer = load_answerer(open_run(bare, base=str(moved)), cache)
    assert answerer.template.name == "alpaca"
    assert isinstance(answerer.answer([(Message("user", "say one"),)], Sampling(max_new_tokens=4))[0], str)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_write_into_the_run_without_prompts_and_leave_the_environment_unchanged(
    tracker, tiny_llama, rows, cache, tmp_path, quiet, monkeypatch
):
    if tracker == "tensorboard":
        pytest.importorskip("tensorboard")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", f"tracker.to={tracker}", "train.max_steps=2")
    before, during = dict(os.environ), {}
    fetch = loop.QLoraTrainer.get_batch_samples
    monkeypatch.setattr(
        loop.QLoraTrainer, "get_batch_samples", lambda *given: during.update(os.environ) or fetch(*given)
    )
    run = train(recipe, console=quiet, cache=cache)
    assert during.keys() > before.keys(), "the tracker's or the libraries' variables"
    assert dict(os.environ) == before
    pattern = {"wandb": "wandb/offline-run-*/*.wandb", "tensorboard": "tensorboard/events.*"}[tracker]
    assert list(run.folder.glob(pattern))
    assert not [path for path in tmp_path.iterdir() if path.name in ("wandb", "mlruns", "mlflow.db")]


def test_the_recipe_of_a_run_records_that_its_base_came_quantised(tiny_llama, rows, tmp_path, quiet):
    """The recipe of the run says how the base is stored, so that chat and resume load it again."""
    first = train(
        recipe_for(tiny_llama, rows, tmp_path / "a", "model.quantization=fp4", "train.max_steps=2"),
        console=quiet,
        cache=tmp_path / "cache",
    )
    (stored,) = (tmp_path / "cache" / "base").iterdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / file, stored)
    run = train(recipe_for(stored, rows, tmp_path / "b", "train.max_steps=2"), console=quiet, cache=tmp_path / "other")
    assert open_run(run.folder).recipe.model.quantization == "fp4"
    assert losses(run) == losses(first)
    answers = load_answerer(open_run(run.folder), tmp_path / "other").answer([(Message("user", "say"),)], Sampling(4))
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("words", "notice"),
    [
        (["train.max_steps=1"], "covers the only step, whose learning rate would be 0: the warm-up is left out"),
        (["train.max_steps=3", "train.warmup=100"], "train.warmup=100 covers all 3 steps: the warm-up is left out"),
    ],
)  # fmt: skip
def test_a_warm_up_that_would_be_the_whole_run_is_shortened(words, notice, tiny_llama, rows, cache, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words, UNASKED), console=console, cache=cache)
    print(console.file.getvalue())
    assert notice in console.file.getvalue()
    assert all(tensor.any() for name, tensor in adapter_of(run).items() if "lora_B" in name)
    assert next(line.learning_rate for line in read_metrics(run) if line.loss is not None) == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["train.max_steps=1", "train.learning_rate=1e-60"], "no update in 1 step was large enough to change it"),
        (
            ["train.max_steps=4", "train.warmup=1", "train.learning_rate=1e-14", "train.evaluate_every=1"],
            "no later validation loss was better than that of step 1, before anything was learnt",
        ),
        (["train.max_steps=3", "train.learning_rate=1e-60", "train.evaluate_every=2"], "every B of the saved adapter is zero"),
    ],
)  # fmt: skip
def test_a_run_that_has_learnt_nothing_is_an_error(words, why, tiny_llama, rows, cache, tmp_path, quiet):
    recipe = recipe_for(tiny_llama, rows, tmp_path / "run", *words, UNASKED)
    with pytest.raises(TrainingError) as caught:
        train(recipe, console=quiet, cache=cache)
    print(caught.value)
    assert why in str(caught.value)
    assert "rate" in caught.value.fix
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_samples_are_answered_from_dequantised_weights_and_the_4_bit_ones_come_back(
    tiny_llama, rows, cache, tmp_path, monkeypatch
):
    answer, before, during = SampleAnswers._answer, [], []

    def watched(self, kept, row, place):
        during.append(len(list(linear4bits(self.model))))
        return answer(self, kept, row, place)

    def fused(model, *words, **more):
        before[:] = linear4bits(model)
        trained.append(model)
        return fuse(model, *words, **more)

    trained = []
    monkeypatch.setattr(SampleAnswers, "_answer", watched)
    monkeypatch.setattr(preparation, "fuse", fused)
    monkeypatch.setattr(samples, "SECONDS", 0.0)
    console = Console(file=io.StringIO(), width=200)
    words = ["train.max_steps=4", "train.evaluate_every=2", "train.samples=2"]
    run = train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=console, cache=cache)
    assert during == [0, 0, 0, 0]
    assert before
    assert list(map(id, linear4bits(trained[0]))) == list(map(id, before))
    told = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    answers = [AutoTokenizer.from_pretrained(tiny_llama)(line["answer"])["input_ids"] for line in told]
    assert max(map(len, answers)) < 8, "an answer whose time is over goes no further"
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if line.endswith(("evaluating", "answering samples"))] == [
        "step     0  evaluating", "step     2  evaluating", "step     2  answering samples",
        "step     4  evaluating", "step     4  answering samples",
    ]  # fmt: skip


def test_a_resumed_run_counts_its_time_before_the_resumption(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    words = ["train.max_steps=6", "train.evaluate_every=2", "train.samples=0"]
    whole = train(recipe_for(tiny_llama, rows, tmp_path / "whole", *words), console=quiet, cache=cache)
    interrupted(monkeypatch, 5, recipe_for(tiny_llama, rows, tmp_path / "cut", *words), quiet, cache)
    cut = open_run(tmp_path / "cut")
    mark = cut.latest_checkpoint() / "COMPLETE"
    spent = json.loads(mark.read_text())
    assert spent["seconds"] > 0
    mark.write_text(json.dumps({"seconds": 1000.0, "peak_memory": 77_000_000_000}))  # of a leg on a larger machine
    resume(cut.folder, console=quiet, cache=cache)
    summaries = [json.loads((run.folder / "summary.json").read_text()) for run in (cut, whole)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"] == sum(line.tokens or 0 for line in read_metrics(whole))
    assert summaries[0]["train_loss"] == summaries[1]["train_loss"]
    assert 1000 < summaries[0]["seconds"] < 1000 + 300
    assert summaries[0]["peak_memory_gb"] == 77.0
    steps = sum(line.seconds or 0 for line in read_metrics(cut))
    assert summaries[0]["tokens_per_second"] == pytest.approx(summaries[0]["tokens"] / steps, abs=0.1)
    assert "| speed in training |" in (cut.folder / "README.md").read_text()


def test_the_reported_loss_is_that_of_the_saved_adapter(tiny_llama, rows, cache, tmp_path, quiet):
    words = ["train.max_steps=6", "train.evaluate_every=2", "train.learning_rate=3", UNASKED]
    for keep in ("true", "false"):
        recipe = recipe_for(tiny_llama, rows, tmp_path / keep, *words, f"train.keep_best={keep}")
        run = train(recipe, console=quiet, cache=cache)
        summary = json.loads((run.folder / "summary.json").read_text())
        told = {line.step: line.eval_loss for line in read_metrics(run) if line.eval_loss is not None}
        assert summary["validation_loss"]["kept"] == told[summary["kept_step"]]
        assert (summary["kept_step"] == 6) == (keep == "false" or told[6] == min(told[2], told[4], told[6]))


def test_memory_saving_changes_are_suggested_step_by_step():
    words = ["model.path=m", "data.path=d", "model.quantization=none", "engine.policy=keep-all", "train.micro_batch=2"]
    given = []
    for _ in range(7):
        fix = memory_saving_change(load_recipe(None, words), LLAMA_2_7B)
        given.append(fix.split()[0])
        words += fix.partition(" (")[0].split()
    assert given == [
        "model.quantization=nf4", "engine.policy=auto", "train.micro_batch=1", "engine.policy=host",
        "engine.embedding=host", "engine.weights=host", "data.max_length=512",
    ]  # fmt: skip
    plain = load_recipe(None, ["model.path=m", "data.path=d", "engine.fused=false", "train.micro_batch=1",
                               "train.gradient_checkpointing=false"])  # fmt: skip
    assert memory_saving_change(plain, LLAMA_2_7B) == "train.gradient_checkpointing=true"
    mixed = ["engine.policy=host", "engine.embedding=host", "engine.weights=host", "engine.resident_layers=9"]
    mixed_recipe = load_recipe(None, ["model.path=m", "data.path=d", "train.micro_batch=1", *mixed])
    assert memory_saving_change(mixed_recipe, LLAMA_2_7B).startswith("engine.resident_layers=0")
    last = load_recipe(None, ["model.path=m", "data.path=d", "engine.policy=host", "train.micro_batch=1"])
    tied = dataclasses.replace(LLAMA_2_7B, tied=True)
    assert memory_saving_change(last, tied).startswith("engine.weights=host"), "a tied embedding stays on the device"


def test_what_does_not_fit_says_what_the_run_takes(tmp_path):
    recipe = load_recipe(None, ["model.path=m", "data.path=d", "lora.r=16"])
    with pytest.raises(TrainingError) as caught, explained_memory(recipe, LLAMA_2_7B, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    print(caught.value)
    taken = {line[:-10].strip(): line.split()[-2] for line in caught.value.what.splitlines()[1:]}
    assert taken["adapters"] == taken["gradients"] == "0.16"  # 40 million parameters of 4 bytes
    assert taken["optimiser state"] == "0.00"  # paged: torch does not count it
    assert taken["kept activations"] == "12.27"
    assert taken["planned, in total"] == "17.00"
    assert caught.value.fix == "the same command with train.micro_batch=2 train.accumulation=8 (the same step)"


def test_what_is_not_planned_is_told_without_its_activations(tmp_path):
    recipe = load_recipe(
        None, ["model.path=m", "data.path=d", "engine.fused=false", "train.gradient_checkpointing=false"]
    )
    with pytest.raises(TrainingError) as caught, explained_memory(recipe, LLAMA_2_7B, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    taken = {line[:-10].strip(): line.split()[-2] for line in caught.value.what.splitlines()[1:]}
    assert taken["base (nf4)"] == "3.87"  # as measured: docs/benchmarks.md
    assert taken["adapters"] == "0.16"
    assert taken["planned, in total"] == "4.19"


SPLIT = "in {run}/recipe.yaml set train.micro_batch=4 train.accumulation=8 (the same step), then: nybble train --resume {run}"
ANOTHER = "nybble train -c {run}/recipe.yaml out=ANOTHER "
ON_HOST = ["engine.policy=host", "engine.embedding=host", "engine.weights=host"]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train.micro_batch=8"], SPLIT),
        (["train.micro_batch=1"], ANOTHER + "engine.policy=host; the same step, slower"),
        (["train.micro_batch=1", *ON_HOST], ANOTHER + "data.max_length=512"),
    ],
    ids=["split", "policy", "length"],
)
def test_a_run_that_has_a_folder_is_told_the_whole_command(words, fix, tmp_path):
    (tmp_path / "recipe.yaml").touch()
    recipe = load_recipe(None, ["model.path=m", "data.path=d", *words])
    with pytest.raises(TrainingError) as caught, explained_memory(recipe, LLAMA_2_7B, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    print(caught.value)
    assert caught.value.fix == fix.format(run=tmp_path)


def test_the_gradients_norm_is_the_same_however_the_optimiser_holds_them(tiny_llama, rows, cache, tmp_path, quiet):
    norms = {}
    for optimizer in ("adamw", "adamw_8bit"):
        words = ["train.max_steps=3", f"train.optimizer={optimizer}", "train.max_grad_norm=0.1", "train.warmup=0"]
        words.append(UNASKED)
        run = train(recipe_for(tiny_llama, rows, tmp_path / optimizer, *words), console=quiet, cache=cache)
        norms[optimizer] = [line.grad_norm for line in read_metrics(run) if line.grad_norm is not None]
    assert norms["adamw"][0] == pytest.approx(norms["adamw_8bit"][0], rel=1e-5)
    assert norms["adamw"] == pytest.approx(norms["adamw_8bit"], rel=0.05)  # 8-bit steps end elsewhere, but not far away


def test_the_next_step_s_batches_are_collated_before_a_step_ends(tiny_llama, rows, cache, tmp_path, quiet, monkeypatch):
    """While the device still works; and no step beyond the last is read."""
    seen: list[str] = []
    collate, clear = Collator.__call__, CurrentStep.clear
    words = ["train.max_steps=3", "data.validation=0", "train.micro_batch=2", "train.accumulation=1", "train.samples=0"]
    monkeypatch.setattr(Collator, "__call__", lambda self, rows: seen.append("rows") or collate(self, rows))
    monkeypatch.setattr(
        "nybble.preflight.preparation.inspect", lambda *args: None
    )  # the X-ray lays out rows of its own
    monkeypatch.setattr(CurrentStep, "clear", lambda self: seen.append("over") or clear(self))
    train(recipe_for(tiny_llama, rows, tmp_path / "run", *words), console=quiet, cache=cache)
    # Accelerate's loader reads one batch further than it gives: two for the first step, one for each of the others.
    assert seen == ["rows", "rows", "rows", "over", "rows", "over", "over"]
