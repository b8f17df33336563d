"""The recipe's section `export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.section import Options


class ExportOptions(Options):
    """Exports made after training; whether they are possible is checked before the first step."""

    to: list[Literal["adapter", "merged", "gguf"]] = Field(default_factory=list)
    """Exports into RUN/export: adapter (PEFT), merged (a Transformers folder), gguf (llama.cpp, Q8_0)."""
