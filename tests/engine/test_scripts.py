"""fuse in somebody else's training script: transformers.Trainer and TRL, before and after the trainer is built."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import nybble
from nybble.weights.on_cpu import stay_unpacked
from tests.conftest import ROOT, WORDS

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    lines = [{"text": " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 4 + n % 6))} for n in range(24)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def built(kind, folder, tokenizer, texts, tmp_path, when):
    """The losses of a run, fused before or after the trainer is built, or never."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stay_unpacked(model)
    torch.manual_seed(0)
    model = get_peft_model(model, LORA)
    if when == "before":
        nybble.fuse(model)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    tokenizer.pad_token = "<unk>"
    if kind == "trl":
        words = {"max_length": 64, "dataset_text_field": "text", "average_tokens_across_devices": False, **COMMON}
        arguments = SFTConfig(output_dir=str(tmp_path), **words)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        ids = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in rows]
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
            train_dataset=Dataset.from_list(ids),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    if when == "after":
        nybble.fuse(trainer.model)
    trainer.train()
    done = nybble.fusion(trainer.model)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], done


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_fuse_before_or_after_the_trainer_is_built(kind, tiny_llama, tiny_tokenizer, texts, tmp_path, caplog):
    plain, nothing = built(kind, tiny_llama, tiny_tokenizer, texts, tmp_path, "never")
    assert nothing is None
    for when in ("before", "after"):
        losses, done = built(kind, tiny_llama, tiny_tokenizer, texts, tmp_path, when)
        assert losses == pytest.approx(plain, abs=1e-3)
        assert done.fallen_back == 0, done.describe()
        taken_over = any("gradient checkpointing was on" in notice for notice in done.notices)
        assert taken_over == (kind == "trl"), "TRL switches it on"
    assert len(set(plain)) == 3


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_grpo_s_batches_with_padding_on_both_sides_are_fused(peaky_llama, tiny_tokenizer, tmp_path):
    """Prompts are padded on the left, completions on the right; the reference model is the one without its adapter."""
    tiny_tokenizer.pad_token = "<unk>"
    prompts = [{"prompt": " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 3 + n % 6))} for n in range(16)]
    words = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "bf16": False, **COMMON}

    def learned(fused):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32), LORA)
        trainer = GRPOTrainer(
            model=nybble.fuse(model) if fused else model,
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=GRPOConfig(output_dir=str(tmp_path), **words),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tiny_tokenizer,
        )
        masks = []
        trainer.model.register_forward_pre_hook(
            lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
        )
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
        return [(line["loss"], line["grad_norm"], line["kl"], line["reward"]) for line in logged], masks, model

    expected, _, _ = learned(False)
    ours, masks, model = learned(True)
    for line, wanted in zip(ours, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert len({line[0] for line in ours}) == 3
    assert any((mask[:, 0] == 0).any() for mask in masks)
    assert nybble.fusion(model).fallen_back == 0, nybble.fusion(model).describe()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [{"prompt": " ".join(WORDS[: 1 + n % 7]), "chosen": f" {WORDS[n]}", "rejected": " no"} for n in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # a Trainer's default, on a CPU
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("script, rows", [("plain_trainer.py", "texts"), ("trl_dpo.py", "pairs")])
def test_an_example_runs_in_this_process(script, rows, tiny_llama, request, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, str(tiny_llama), str(request.getfixturevalue(rows)), "2"])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert "2 of 2 decoder layers fused" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, rows", [("plain_trainer.py", "texts"), ("trl_sft.py", "texts"), ("trl_dpo.py", "pairs")]
)
def test_the_examples_run(script, rows, tiny_llama, request, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = request.getfixturevalue(rows)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, tiny_llama, file, "2"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment, "HF_HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 2 decoder layers fused" in done.stdout
