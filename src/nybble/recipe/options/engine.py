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
    weights: Literal["device", "host", "sharded", "sharded-host"] = "device"
    """Where the decoder layers' weights are: the GPU, the host (streamed), or sharded over the processes or their hosts."""
    resident_layers: int = Field(default=0, ge=0)
    """With any other weights than device, how many layers' stay on the GPU all the same: a short micro batch hides no copies."""
    compute: Literal["bf16", "fp8", "fp8-if-possible"] = "bf16"
    """The number format in which training multiplies by frozen weights: bf16 is model.dtype; fp8 needs Ada or a later card."""
    fp8_skip: list[str] = Field(default_factory=list)
    """With fp8, projections and layers that stay in 16 bits, by name: [down_proj], [layers.0, layers.31]."""
    fp8_fast: Literal["forward", "backward", "both", "none"] = "both"
    """With fp8, where its sums have fewer bits: faster on Hopper."""

    @property
    def is_customised(self) -> bool:
        """Whether an option besides `fused` must be followed, and is not the default."""
        return self.policy != "auto" or self.embedding != "device" or self.weights != "device" or self.compute == "fp8"
