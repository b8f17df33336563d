"""The GGUF types that can be exported, and the interface of their writer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.export.merge.merge import MergedModel
from nybble.plan.file_bytes import GGUF_BITS, GGUF_K_BITS

QUANTS = ("Q8_0",)
"""The default GGUF types."""
OWN_QUANTS = tuple(GGUF_BITS)
"""GGUF types that the gguf package writes."""
K_QUANTS = tuple(GGUF_K_BITS)
"""GGUF types that llama.cpp's own tool makes from an F16."""
QUANTIZER = "llama-quantize"
GET_QUANTIZER = (
    "brew install llama.cpp, or build it: "
    "git clone https://github.com/ggml-org/llama.cpp && cmake -S llama.cpp -B build && cmake --build build -t llama-quantize; "
    "or use --quant Q8_0 or Q4_0"
)


class GgufConverter(Protocol):
    """Writes GGUF files: `nybble.export.gguf.writer.Converter`, if the gguf package is installed."""

    def check(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that could not be written."""

    def write(self, file: pathlib.Path, model: MergedModel, quant: str, done: Callable[[int], None]) -> None:
        """Write one file."""
