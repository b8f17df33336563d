"""What the decoder needs to know of a model, read from the live modules: its own weights, no copy of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

from nybble.engine.fusion import streams_weights
from nybble.engine.reader import PROJECTIONS, describe
from nybble.weights.projections import ActiveAdapter, ProjectionGroup, read_named_adapters
from nybble.weights.watched import Ineligible, Watched, check_unhooked, only_requires_gradients

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others' frequencies change with the length
NamedAdapters = Mapping[str, tuple[ActiveAdapter, ...]]


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer."""

    groups: Mapping[str, ProjectionGroup]
    """By the names of `GROUPS`; frozen weights only."""
    adapters: Mapping[str, NamedAdapters]
    """Of each group, by name."""
    norms: tuple[torch.Tensor, torch.Tensor]
    """(h,) float32, before attention and before the MLP."""
    eps: tuple[float, float]


@dataclass(frozen=True)
class DecoderModel:
    """A model of the Llama architecture."""

    layers: Sequence[DecoderLayer]
    adapters: tuple[str, ...]
    embedding: torch.Tensor
    """(vocabulary, h)"""
    norm: torch.Tensor
    """(h,) float32"""
    eps: float
    head: torch.Tensor
    """(vocabulary, h)"""
    heads: int
    kv_heads: int
    head_size: int
    rotary: Any
    """The model's own module for rotary positions."""
    vocabulary: int
    positions: int
    """Tokens that the model was made for."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.embedding.shape[1])

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embedding.device

    def rotary_tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of so many positions, (positions, head size / 2) float32."""
        numbers = torch.arange(positions, device=self.device).unsqueeze(0)
        like = torch.empty(0, device=self.device, dtype=torch.float32)
        cosine, sine = self.rotary(like, numbers)
        half = self.head_size // 2
        return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()


class _Reading(Watched):
    """Reads modules for answers, to which it does not matter what is being trained."""

    def is_trained(self, parameter: torch.nn.Parameter) -> bool:
        return False


def read_model(model: PreTrainedModel | PeftModel) -> DecoderModel:
    """The model with all of its adapters, as they are now.

    Raises:
        Ineligible: the first reason why the decoder cannot compute it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(base) is not LlamaForCausalLM:
        raise Ineligible(f"the model is a {type(base).__name__}, not a LlamaForCausalLM")
    inner, config = base.model, base.config
    if streams_weights(base):
        raise Ineligible("its weights are on the host")
    if inner.embed_tokens.weight.device != inner.norm.weight.device:
        raise Ineligible("its embedding is on the host")
    names = tuple(model.peft_config) if isinstance(model, PeftModel) else ()
    _check_outside(base)
    plain = [describe(layer, _Reading()) for layer in inner.layers]
    layers = [
        DecoderLayer(
            fused.groups, _read_adapters(layer, names),
            (fused.norms[0].detach().float(), fused.norms[1].detach().float()), fused.sizes.eps,
        )
        for layer, fused in zip(inner.layers, plain, strict=True)
    ]  # fmt: skip
    sizes = plain[0].sizes
    return DecoderModel(
        layers, names, inner.embed_tokens.weight.detach(), inner.norm.weight.detach().float(), inner.norm.variance_epsilon,
        base.lm_head.weight.detach(), sizes.heads, sizes.key_heads, sizes.head_size, inner.rotary_emb, int(config.vocab_size),
        int(config.max_position_embeddings),
    )  # fmt: skip


def _read_adapters(layer: Any, names: Sequence[str]) -> Mapping[str, NamedAdapters]:
    return {
        group: {name: read_named_adapters(layer.get_submodule(parent), projections, name) for name in names}
        for group, (parent, projections) in PROJECTIONS.items()
    }


def _check_outside(base: Any) -> None:
    """What stands around the layers is as plain as they are.

    Raises:
        Ineligible: it is not.
    """
    watched = Watched()
    for name, module, expected in (
        ("embed_tokens", base.model.embed_tokens, torch.nn.Embedding),
        ("norm", base.model.norm, LlamaRMSNorm),
        ("lm_head", base.lm_head, torch.nn.Linear),
    ):
        if type(module) is not expected:
            raise Ineligible(f"found {type(module).__name__} where {expected.__name__} was expected ({name})")
        if not only_requires_gradients(module):
            check_unhooked(watched, name, module)
    if base.lm_head.bias is not None:
        raise Ineligible("lm_head has a bias")
    kind = base.model.rotary_emb.rope_type
    if kind not in STATIC_ROPE:
        raise Ineligible(f"its rotary positions are of the type {kind}, whose frequencies change with the length")
