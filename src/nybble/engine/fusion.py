"""A fused model at work: what each batch meets in each layer, decided once before the backbone runs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from nybble.engine import attention
from nybble.engine.batch import Unfit, segments_of, tokens_of
from nybble.engine.budget import Budget
from nybble.engine.layer import GROUPS, SLOTS, Call, FusedLayer
from nybble.engine.passes import LayerFunction
from nybble.engine.projections import Adapter, Ineligible, base_of, ranks_of
from nybble.plan.activations import LADDER, TILE, mix, passing_bytes

Policy = Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"]
Adapters = Mapping[str, tuple[Adapter, ...]]
log = logging.getLogger("nybble")
PASS = "nybble_pass"  # the keyword that the backbone hands through to its layers


@dataclass
class Fusion:
    """What was fused, and what became of it."""

    policy: Policy
    layers: dict[int, FusedLayer]
    """By position."""
    refused: dict[int, str]
    """Layers that keep their own forward, and why."""
    operations: str
    """Home of the operations, with the reason."""
    budget: Budget
    attention: attention.Choice | None = None
    """Chosen at the first batch, when the compute type is known."""
    policies: tuple[str, ...] = ()
    """Of the last batch that was trained on, by layer."""
    passed: dict[int, str] = field(default_factory=dict)
    """Fused layers that went their own way in the last batch, and why."""
    notices: list[str] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    taken_over: set[int] = field(default_factory=set)
    """Layers whose checkpointing somebody had switched on."""

    @property
    def fallen_back(self) -> int:
        """Layers that the last batch met unfused."""
        return len(self.refused) + len(self.passed)

    def describe(self) -> str:
        """Layers, operations, attention, policies and refusals, a line each."""
        total = len(self.layers) + len(self.refused)
        lines = [f"{total - self.fallen_back} of {total} decoder layers fused; {self.operations}"]
        if self.attention is not None:
            lines.append(f"attention: {self.attention.reason}")
        if self.policies:
            lines.append(f"kept for backward: {self.kept_words()}")
        reasons = Counter([*self.refused.values(), *self.passed.values()])
        return "\n".join([*lines, *(f"{count} not fused: {why}" for why, count in reasons.items())])

    def kept_words(self) -> str:
        """The last batch's policies, counted."""
        counts = Counter(self.policies)
        return ", ".join(f"{counts[name]} x {name}" for name in LADDER if counts[name])

    def tell(self, notice: str) -> None:
        """A notice, once."""
        if notice not in self.notices:
            self.notices.append(notice)
            log.warning("nybble: %s", notice)


@dataclass(frozen=True)
class Plan:
    """One batch in one layer."""

    layer: FusedLayer
    adapters: Mapping[str, tuple[Adapter, ...]]
    attention: attention.Backend
    segments: attention.Segments
    dtype: torch.dtype
    policy: str
    seed: int


def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *words: Any, **keywords: Any) -> torch.Tensor:
    """Stands before a layer's own forward, which takes what is not planned."""
    plan: Plan | None = keywords.pop(PASS, {}).get(self)
    if plan is None:
        result: torch.Tensor = type(self).forward(self, hidden_states, *words, **keywords)
        return result
    cosine, sine = (part.flatten(0, 1).contiguous() for part in keywords["position_embeddings"])
    call = Call(
        plan.layer, plan.adapters, plan.attention, plan.segments, cosine, sine, plan.dtype, plan.policy, plan.seed
    )
    fused: torch.Tensor = LayerFunction.apply(hidden_states, call, *call.parameters())
    return fused


def begin(backbone: LlamaModel, words: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Hook before the backbone runs: plan this batch for all layers, or leave it to them."""
    self: Fusion = backbone.nybble_fusion
    training = backbone.training and torch.is_grad_enabled()
    if training and keywords.get("past_key_values") is None:
        keywords["use_cache"] = False
    try:
        if words:
            raise Unfit("inputs are given without their names")
        use_cache = keywords.get("use_cache")
        if backbone.config.use_cache if use_cache is None else use_cache:
            raise Unfit("a key-value cache is built")
        segments = segments_of({"output_attentions": backbone.config.output_attentions, **keywords})
    except Unfit as why:
        self.passed = dict.fromkeys(self.layers, str(why))
        if training:
            self.tell(f"a batch went through the layers' own forward: {why}")
        _take_over(self, backbone, ())
        return words, keywords
    plans = _plan(self, backbone, segments, keywords.get("inputs_embeds"))
    _take_over(self, backbone, plans)
    keywords[PASS] = {backbone.layers[place]: plan for place, plan in plans.items()}
    if len(plans) == len(backbone.layers):
        # No layer reads the mask. Transformers takes one of four dimensions as it is, and so builds none of
        # length x length for packed rows: 14 GB at 120,000 tokens.
        keywords["attention_mask"] = torch.empty(0, 0, 0, 0, device=tokens_of(keywords).device)
    return words, keywords


def _take_over(self: Fusion, backbone: LlamaModel, planned: Container[int]) -> None:
    """Fused layers recompute by their policy; a checkpoint around them would compute everything twice. Layers that go
    their own way get the checkpointing back that somebody wanted."""
    for place in self.layers:
        layer = backbone.layers[place]
        if layer.gradient_checkpointing:
            self.taken_over.add(place)
        if place in self.taken_over:
            layer.gradient_checkpointing = place not in planned
    if self.taken_over and planned:
        self.tell(f"gradient checkpointing was on; the fused layers follow policy={self.policy!r} instead")


def _plan(
    self: Fusion, backbone: LlamaModel, segments: attention.Segments, embedded: torch.Tensor | None
) -> dict[int, Plan]:
    """What every fused layer does with this batch; those that cannot are noted with the reason."""
    self.passed = {}
    adapters: dict[int, Adapters] = {}
    for place, layer in self.layers.items():
        try:
            adapters[place] = {name: layer.groups[name].adapters() for name in GROUPS}
        except Ineligible as why:
            self.passed[place] = str(why)
            self.tell(f"a layer went its own way: {why}")
    if not adapters:
        return {}
    residual = backbone.embed_tokens.weight.dtype if embedded is None else embedded.dtype
    first = self.layers[next(iter(adapters))]
    device, dtype, sizes = first.norms[0].device, _compute_type(first, residual), first.sizes
    if self.attention is None:
        self.attention = attention.choose(device, dtype, sizes.heads, sizes.key_heads, sizes.head_size)
    backend = self.attention.of(segments)
    for slot, numbers in _largest(self.layers, adapters, segments.tokens).items():
        first.workspace.reserve(slot, numbers, dtype, device)
    policies = _policies(self, adapters, segments.tokens, dtype, residual)
    seed = int(torch.randint(2**62, ()).item()) if backbone.training else 0
    return {
        place: Plan(self.layers[place], own, backend, segments, dtype, policy, seed + 2**40 * place)
        for (place, own), policy in zip(adapters.items(), policies, strict=True)
    }


def _policies(
    self: Fusion, adapters: Mapping[int, Adapters], tokens: int, dtype: torch.dtype, residual: torch.dtype
) -> tuple[str, ...]:
    if not torch.is_grad_enabled():
        return (LADDER[0],) * len(adapters)  # nothing is kept
    if self.policy != "auto":
        self.policies = (self.policy,) * len(adapters)
        return self.policies
    place, own = next(iter(adapters.items()))
    shape = self.layers[place].shape(own, dtype, residual)
    trained = [
        part
        for of_layer in adapters.values()
        for group in of_layer.values()
        for one in group
        for part in (one.a, one.b)
    ]
    budget = self.budget.activations(tokens, passing_bytes(shape, tokens), trained)
    self.policies = mix(shape, len(adapters), tokens, budget)
    return self.policies


def _compute_type(layer: FusedLayer, residual: torch.dtype) -> torch.dtype:
    """16 bits where the model is held in them; where somebody made its norms float32, as autocast or the 4-bit layers say."""
    if residual != torch.float32:
        return residual
    device = layer.norms[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    stored: torch.dtype = getattr(base_of(layer.groups["qkv"].modules[0]), "compute_dtype", None) or residual
    return stored


def _largest(layers: Mapping[int, FusedLayer], adapters: Mapping[int, Adapters], tokens: int) -> dict[str, int]:
    """Numbers that each slot of the workspace has to hold."""
    sizes: dict[str, int] = {}
    for place, own in adapters.items():
        for name, group in layers[place].groups.items():
            slot, ranks = SLOTS[name] if tokens > TILE else "wide", ranks_of(own[name])
            sizes[slot] = max(sizes.get(slot, 0), (group.outputs + ranks) * (group.inputs + ranks))
    return sizes
