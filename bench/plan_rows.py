"""The runs of bench/plan.py, chosen before any of them was measured; options that differ from `COMMON`."""

from __future__ import annotations

from typing import NamedTuple

COMMON = (
    "data.template=alpaca", "data.overlength=drop", "data.validation=0", "data.packing=true", "data.max_length=2048",
    "lora.r=16", "train.micro_batch=4", "train.accumulation=1", "train.max_steps=3", "train.samples=0",
    "train.evaluate_every=3",
)  # fmt: skip


class Row(NamedTuple):
    """A run."""

    model: str
    options: str
    held_back: bool = False
    """Measured only once the model of bytes had been corrected by the others."""


QV = "lora.targets=[q_proj,v_proj]"
UNPACKED = "data.packing=false data.max_length=1024"
ROWS = (
    Row("llama-2-7b", "engine.policy=keep-all"),
    Row("llama-2-7b", "engine.policy=drop-mlp"),
    Row("llama-2-7b", "engine.policy=drop-qkv", held_back=True),
    Row("llama-2-7b", "engine.policy=layer-input data.validation=32"),
    Row("llama-2-7b", "engine.policy=host"),
    Row("llama-2-7b", "engine.policy=layer-input train.micro_batch=16 data.max_length=512 lora.r=64"),
    Row("llama-2-7b", "engine.policy=host train.micro_batch=1 data.max_length=16384", held_back=True),
    Row("llama-2-7b", f"engine.policy=layer-input train.micro_batch=1 data.max_length=8192 lora.r=8 {QV}"),
    Row("llama-2-7b", f"engine.policy=host train.micro_batch=16 {UNPACKED}"),
    Row("llama-2-7b", "train.vram=12GB data.validation=32"),
    Row("llama-2-7b", "train.vram=6GB train.micro_batch=1", held_back=True),
    Row("llama-2-7b", "engine.policy=host engine.weights=host engine.embedding=host train.micro_batch=1"),
    Row("llama-2-7b", "engine.weights=host train.vram=8GB"),
    Row(
        "llama-2-7b",
        f"engine.policy=layer-input train.micro_batch=8 lora.r=128 data.validation=32 {UNPACKED}",
        held_back=True,
    ),
    Row("smollm2-135m", "engine.policy=keep-all train.micro_batch=16"),
    Row("smollm2-135m", f"engine.policy=keep-all train.micro_batch=8 lora.r=8 {QV} data.validation=32 {UNPACKED}"),
    Row("smollm2-135m", "engine.policy=layer-input train.micro_batch=1 data.max_length=16384"),
    Row("smollm2-135m", "engine.policy=host engine.weights=host", held_back=True),
    Row("llama-2-13b", "engine.policy=keep-all train.micro_batch=2"),
    Row("llama-2-13b", "engine.policy=host data.max_length=1024 data.validation=32"),
    Row("llama-2-13b", f"engine.policy=drop-qkv train.micro_batch=2 lora.r=8 {QV}", held_back=True),
    Row(
        "llama-2-13b",
        "engine.policy=host engine.weights=host engine.embedding=host train.micro_batch=1 data.max_length=4096",
    ),
    Row("llama-3-8b", "engine.policy=keep-all train.micro_batch=2"),
    Row("llama-3-8b", "engine.policy=host data.validation=32", held_back=True),
    Row("llama-3-8b", "engine.policy=layer-input engine.weights=host engine.embedding=host train.micro_batch=1"),
    Row("llama-3-8b", "engine.policy=drop-mlp train.micro_batch=1 data.max_length=8192 lora.r=128"),
    Row("llama-3-8b", f"engine.policy=layer-input train.micro_batch=16 {UNPACKED}", held_back=True),
    Row("llama-2-7b", "engine.fused=false"),
    Row("llama-2-7b", "engine.fused=false train.micro_batch=1 data.max_length=4096", held_back=True),
    Row("smollm2-135m", "engine.fused=false train.micro_batch=8"),
    Row("llama-3-8b", "engine.fused=false train.micro_batch=2 data.max_length=1024"),
)
