"""A plain TRL DPO script with one added line, nybble.fuse(trainer.model).

    python examples/trl_dpo.py MODEL PAIRS.jsonl [steps]

PAIRS.jsonl has the columns `prompt`, `chosen` and `rejected`. Without a ref_model, the reference is the same base with its
adapter off: no second model, and its pass is fused too. The line belongs after the trainer is built, which adds the adapter.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

import nybble

path, pairs, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100
bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
dtype = torch.bfloat16 if bf16 else torch.float32
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
model = AutoModelForCausalLM.from_pretrained(
    path,
    dtype=dtype,
    device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ),
)
trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=pairs, split="train"),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_length=512,
        max_steps=steps,
        learning_rate=5e-5,
        bf16=bf16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)

nybble.fuse(trainer.model)

trainer.train()
print(nybble.fusion(trainer.model).describe())
