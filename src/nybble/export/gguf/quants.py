"""The GGUF types that can be exported, and what writes them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.export.merge.merge import MergedModel

QUANTS = ("Q8_0",)
"""GGUF types where none are named."""
OWN_QUANTS = ("F16", "Q8_0", "Q4_0")
"""GGUF types that the gguf package writes."""
K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
"""GGUF types that llama.cpp's own tool makes from an F16."""
QUANTIZER = "llama-quantize"
GET_QUANTIZER = (
    "brew install llama.cpp, or build it: "
    "git clone https://github.com/ggml-org/llama.cpp && cmake -S llama.cpp -B build && cmake --build build -t llama-quantize; "
    "or take --quant Q8_0 or Q4_0"
)
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5, "Q2_K": 3.2, "Q3_K_S": 3.6, "Q3_K_M": 4.0, "Q3_K_L": 4.3, "Q4_K_S": 4.7,
        "Q4_K_M": 4.9, "Q5_K_S": 5.6, "Q5_K_M": 5.7, "Q6_K": 6.6}  # fmt: skip
"""Bits per weight, roughly, for the space on the disk; of the K-quants as llama.cpp lists them for Llama 2 7B."""


class GgufConverter(Protocol):
    """Writes GGUF files: `nybble.export.gguf.writer.Converter`, where the gguf package is installed."""

    def check(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that could not be written."""

    def write(self, file: pathlib.Path, model: MergedModel, quant: str, done: Callable[[int], None]) -> None:
        """Write one file."""
