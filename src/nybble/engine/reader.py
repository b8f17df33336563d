"""What the engine needs to know about a decoder layer, read from the live modules whenever they have changed."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from nybble.engine.layer import FusedLayer, LayerSizes
from nybble.weights.projections import read_group, unwrapped
from nybble.weights.watched import Ineligible, Watched, check_unhooked

PROJECTIONS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")), "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")), "down": ("mlp", ("down_proj",)),
}  # fmt: skip
"""Of each group: the module, and its projections in it."""
CACHED_STATES = 2  # of a layer: DPO alternates between the adapter and the base at every step


class LayerReader:
    """Reads one decoder layer, and caches what it read."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self._cache: list[tuple[Watched, FusedLayer | Ineligible]] = []

    def read(self) -> FusedLayer:
        """The layer as it is now.

        Raises:
            Ineligible: the first reason why it falls back to its original forward.
        """
        result = next((result for watched, result in self._cache if watched.is_unchanged()), None) or self._describe()
        if isinstance(result, Ineligible):
            raise Ineligible(str(result))
        return result

    def _describe(self) -> FusedLayer | Ineligible:
        watched = Watched()
        result: FusedLayer | Ineligible
        try:
            result = describe(self.layer, watched)
        except Ineligible as why:
            result = why.with_traceback(None)
        # A state whose weights have moved is dropped, or replaced weights would not be freed.
        valid = [entry for entry in self._cache if entry[0].are_weights_in_place()]
        self._cache = [(watched, result), *valid][:CACHED_STATES]
        return result

    def __reduce__(self) -> Any:
        """A copy reads its own modules."""
        return LayerReader, (self.layer,)


def describe(layer: Any, watched: Watched) -> FusedLayer:
    """A layer as it is now; `watched` records every fact that was read.

    Raises:
        Ineligible: with the first reason why the layer falls back to its original forward.
    """
    if type(layer) is not LlamaDecoderLayer:
        raise Ineligible(f"{type(layer).__name__} is not a decoder layer of Llama")
    children: list[Any] = []
    for name, expected in (
        ("self_attn", LlamaAttention),
        ("mlp", LlamaMLP),
        ("input_layernorm", LlamaRMSNorm),
        ("post_attention_layernorm", LlamaRMSNorm),
    ):
        child = watched.module(layer, name)
        if type(child) is not expected:
            raise Ineligible(f"found {type(child).__name__} where {expected.__name__} was expected")
        check_unhooked(watched, name, child)
        children.append(child)
    attention, mlp, *norms = children
    _check_attention(attention, watched)
    weights = [watched.parameter(norm, "weight") for norm in norms]
    if any(watched.is_trained(weight) for weight in weights):
        raise Ineligible("its norms are trained")
    parents = {"self_attn": attention, "mlp": mlp}
    groups = {group: read_group(watched, parents[parent], names) for group, (parent, names) in PROJECTIONS.items()}
    config, (first, second) = attention.config, norms
    sizes = LayerSizes(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, groups["qkv"].inputs,
        groups["down"].inputs, (first.variance_epsilon, second.variance_epsilon),
    )  # fmt: skip
    return FusedLayer(groups, (weights[0], weights[1]), sizes)


def base_layers(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers of a decoder layer that `describe` accepts, without PEFT's wrappers."""
    found = [layer.get_submodule(f"{parent}.{name}") for parent, names in PROJECTIONS.values() for name in names]
    return [unwrapped(module) for module in found]


def _check_attention(attention: Any, watched: Watched) -> None:
    config = attention.config
    if config.hidden_act != "silu":
        raise Ineligible(f"the activation is {config.hidden_act}, not silu")
    if watched.attribute(attention, "attention_dropout"):
        raise Ineligible(f"attention dropout of {attention.attention_dropout}")
    if watched.attribute(attention, "scaling") != attention.head_dim**-0.5:
        raise Ineligible(f"attention is scaled by {attention.scaling}")
    if attention.head_dim % 2 or attention.head_dim > 256:
        raise Ineligible(f"heads of {attention.head_dim}; even sizes up to 256 are supported")
