"""A plain transformers.Trainer script with one added line, nybble.fuse(model).

    python examples/plain_trainer.py MODEL ROWS.jsonl [steps]

ROWS.jsonl has a column `text`. The line also works after the Trainer is built.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import nybble

path, rows, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 100
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
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

nybble.fuse(model)

data = load_dataset("json", data_files=rows, split="train")
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=data.column_names)
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=4,
    max_steps=steps,
    learning_rate=2e-4,
    bf16=bf16,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
Trainer(
    model=model,
    args=arguments,
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
).train()
print(nybble.fusion(model).describe())
