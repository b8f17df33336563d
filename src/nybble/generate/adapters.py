"""Whether rows of different adapters can be computed in one batch."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from nybble.engine.fusion import streams_weights


def can_mix(model: PreTrainedModel | PeftModel) -> bool:
    """Whether PEFT can tell rows of one batch apart by their adapter (its mixed-adapter batches, `adapter_names`).

    PEFT 0.21 raises for DoRA and for merged layers. If an adapter has its own copy of a module or of embedding rows, it depends
    on the active adapter whether rows of another adapter go through that copy. Such adapters take turns. So do all while the
    weights are on the host: the fused layers know one adapter for a batch.
    """
    if not isinstance(model, PeftModel) or streams_weights(model):
        return False
    merged = any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    return not merged and all(_is_plain(config) for config in model.peft_config.values())


def _is_plain(config: object) -> bool:
    """Whether an adapter adds s B A to linear layers and embeddings, and nothing else."""
    return isinstance(config, LoraConfig) and not (
        config.use_dora or config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    )
