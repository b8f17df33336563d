"""fuse in somebody else's training script: transformers.Trainer and TRL, before and after the trainer is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import nybble
from conftest import ROOT, WORDS
from nybble.quantized import stay_unpacked

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


@pytest.mark.parametrize("script", ["plain_trainer.py", pytest.param("trl_sft.py", marks=pytest.mark.slow)])
def test_the_examples_run(script, tiny_llama, texts, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, tiny_llama, texts, "2"],
        capture_output=True, text=True, cwd=tmp_path, env={**environment, "HF_HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 2 decoder layers fused" in done.stdout
