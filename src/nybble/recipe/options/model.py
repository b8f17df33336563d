"""The recipe's section `model`."""

from __future__ import annotations

from typing import Any, Literal

from nybble.recipe.options.section import Options


class ModelOptions(Options):
    """The base model and how it is stored in memory."""

    path: str = ""
    """Hub id or folder of a Llama-architecture checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; the commit it resolves to is recorded in the run."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base is stored: nf4 (QLoRA's 4-bit NormalFloat), fp4, int8 (LLM.int8) or none (16-bit LoRA)."""
    double_quantization: bool = True
    """Also quantise the 4-bit scales: saves 0.37 bits per weight, 0.3 GB on a 7B."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type; auto picks bfloat16 if the device supports it, and prints the reason."""
    rope_scaling: dict[str, Any] | None = None
    """RoPE scaling for contexts beyond the model's positions, e.g. {rope_type: linear, factor: 2.0}."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto picks CUDA if available. It is an error to ask for cuda without a GPU."""
