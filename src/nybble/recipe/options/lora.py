"""The recipe's section `lora`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.section import Options


class LoraOptions(Options):
    """The adapter that is trained (LoRA, Hu et al. 2021, by PEFT)."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers with an adapter: all-linear (all but the head), or names such as [q_proj, v_proj]."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adaptation (DoRA, Liu et al. 2024): slower, sometimes better at small r."""
    init: Literal["default", "gaussian"] = "default"
    """Initialisation of A: default (Kaiming-uniform) or gaussian. B starts at zero, so training starts from the base itself."""
