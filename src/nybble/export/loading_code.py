"""The code that loads an artefact, for its card."""

from __future__ import annotations

import json

from nybble.export.finished_run import FinishedRun
from nybble.model.base.load import ADAPTER_CONFIG

CHAT = '[{"role": "user", "content": "Hello"}]'


def adapter_lines(source: FinishedRun) -> str:
    """The code for a PEFT adapter on its base, stored as in training."""
    base, kind = json.dumps(source.checkpoint.name), str(source.computed).removeprefix("torch.")
    scaled = ', config=AutoConfig.from_pretrained(".")' if source.run.recipe.model.rope_scaling is not None else ""
    plan = ", quantization_config=plan" if source.quantizes else ""
    names = (
        ["AutoConfig"] * bool(scaled)
        + ["AutoModelForCausalLM", "AutoTokenizer"]
        + ["BitsAndBytesConfig"] * source.quantizes
    )
    lines = [f"import torch; from peft import PeftModel; from transformers import {', '.join(names)}"]
    if source.quantizes:
        lines.append(f"plan = {_plan(source)}")
    if (source.checkpoint.folder / ADAPTER_CONFIG).exists():
        lines.append(f"# Transformers also loads the adapter beside the base: move its {ADAPTER_CONFIG} away first")
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{kind}{scaled}{plan})")
    lines.append('model, tokenizer = PeftModel.from_pretrained(base, "."), AutoTokenizer.from_pretrained(".")')
    return "\n".join(lines)


def _plan(source: FinishedRun) -> str:
    if source.quantization == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    kind = str(source.computed)
    double = source.run.recipe.model.double_quantization
    return (
        f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{source.quantization}", '
        f"bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype={kind})"
    )


def merged_lines() -> str:
    """The code for a plain Transformers folder."""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(".", dtype="auto"), AutoTokenizer.from_pretrained(".")
prompt = tokenizer.apply_chat_template({CHAT}, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0]))"""


def gguf_lines(file: str) -> str:
    """The code for a GGUF file, with llama.cpp's Python package."""
    return f"""from llama_cpp import Llama
model = Llama({json.dumps(file)}, n_ctx=4096)
answer = model.create_chat_completion({CHAT}, temperature=0)
print(answer["choices"][0]["message"]["content"])"""
