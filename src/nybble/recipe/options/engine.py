"""The recipe's section `engine`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.section import Options


class EngineOptions(Options):
    """How the decoder layers are computed."""

    fused: bool = True
    """Use nybble's own forward and backward; unsupported layers keep their original ones, and the run reports them."""
    policy: Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"] = "auto"
    """What a layer keeps for backward, from fastest to leanest; auto picks the fastest that fits in memory."""
    embedding: Literal["device", "host"] = "device"
    """Where the token embedding is kept; host saves 0.26 GB of GPU memory on a 7B."""
    weights: Literal["device", "host"] = "device"
    """Where the decoder layers' weights are kept; host streams them to the GPU, which saves 3.1 GB of its memory on a 7B."""
    resident_layers: int = Field(default=0, ge=0)
    """With weights=host, how many layers' weights stay on the GPU all the same: a short micro batch does not hide the copies."""

    @property
    def is_customised(self) -> bool:
        """Whether an option besides `fused` differs from its default."""
        return self.policy != "auto" or self.embedding != "device" or self.weights != "device"
