"""Checkpoints of known shapes in NF4 with double quantisation and random weights.

    python -m bench.random_checkpoint DIR TOKENIZER llama-2-7b [llama-2-13b ...]

Memory and speed do not depend on the values. Positions go to 200,000, so that rows of any length can be measured.
"""

from __future__ import annotations

import pathlib
import sys

from transformers import AutoTokenizer, BitsAndBytesConfig

from bench.random_model import random_llama
from nybble.plan.known_models import KNOWN
from nybble.plan.shapes import ModelShape

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # adds nothing


def write(folder: pathlib.Path, shape: ModelShape, tokenizer: pathlib.Path) -> None:
    """Write a checkpoint, unless it exists."""
    if (folder / "config.json").exists():
        return
    model = random_llama(shape)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    model.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = CHAT
    loaded.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) < 4 or not set(sys.argv[3:]) <= set(KNOWN):
        sys.exit(__doc__)
    for model in sys.argv[3:]:
        write(pathlib.Path(sys.argv[1]) / model, KNOWN[model].shape, pathlib.Path(sys.argv[2]))
