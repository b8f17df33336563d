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
from nybble.engine.layer import GROUPS, SLOTS, Batch, Call, FusedLayer
from nybble.engine.passes import LayerFunction
from nybble.engine.projections import Active, Ineligible
from nybble.plan.activations import LADDER

Policy = Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"]
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

    def find_active(self) -> dict[int, Mapping[str, Active]]:
        """The adapters of the layers as PEFT has them now; `passed` says of the others why they cannot be fused."""
        self.passed = {}
        active: dict[int, Mapping[str, Active]] = {}
        for place, layer in self.layers.items():
            try:
                active[place] = {name: layer.groups[name].active() for name in GROUPS}
            except Ineligible as why:
                self.passed[place] = str(why)
        return active

    def tell(self, notice: str) -> None:
        """A notice, once."""
        if notice not in self.notices:
            self.notices.append(notice)
            log.warning("nybble: %s", notice)


def forward(self: LlamaDecoderLayer, hidden_states: torch.Tensor, *words: Any, **keywords: Any) -> torch.Tensor:
    """Stands before a layer's own forward, which takes what is not planned."""
    call: Call | None = keywords.pop(PASS, {}).get(self)
    if call is None:
        result: torch.Tensor = type(self).forward(self, hidden_states, *words, **keywords)
        return result
    if call.batch.cosine is None:
        cosine, sine = keywords["position_embeddings"]
        call.batch.cosine, call.batch.sine = cosine.flatten(0, 1).contiguous(), sine.flatten(0, 1).contiguous()
    fused: torch.Tensor = LayerFunction.apply(hidden_states, call, *call.parameters())  # type: ignore[no-untyped-call]
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
    calls = _plan(self, backbone, segments, keywords.get("inputs_embeds"))
    _take_over(self, backbone, calls)
    keywords[PASS] = {backbone.layers[place]: call for place, call in calls.items()}
    if len(calls) == len(backbone.layers):
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
) -> dict[int, Call]:
    """What every fused layer does with this batch; those that cannot are noted with the reason."""
    active = self.find_active()
    for why in dict.fromkeys(self.passed.values()):
        self.tell(f"layers went their own way: {why}")
    if not active:
        return {}
    residual = backbone.embed_tokens.weight.dtype if embedded is None else embedded.dtype
    first = self.layers[next(iter(active))]
    device, dtype, sizes = first.norms[0].device, _compute_type(first, residual), first.sizes
    if self.attention is None:
        self.attention = attention.choose(device, dtype, sizes.heads, sizes.key_heads, sizes.head_size)
    batch = Batch(segments, self.attention.of(segments), dtype, device)
    policies = _policies(self, active, segments.tokens, dtype, residual)
    tiles = {policy: batch.tiles(policy) for policy in set(policies)}
    for slot, numbers in _largest(self.layers, active, max(map(len, tiles.values()))).items():
        first.workspace.reserve(slot, numbers, dtype, device)
    seed = int(torch.randint(2**62, ()).item()) if backbone.training else 0
    return {
        place: Call(self.layers[place], own, batch, tiles[policy], policy, seed + 2**40 * place)
        for (place, own), policy in zip(active.items(), policies, strict=True)
    }


def _policies(
    self: Fusion, active: Mapping[int, Mapping[str, Active]], tokens: int, dtype: torch.dtype, residual: torch.dtype
) -> tuple[str, ...]:
    if not torch.is_grad_enabled():
        return (LADDER[0],) * len(active)  # nothing is kept
    if self.policy != "auto":
        self.policies = (self.policy,) * len(active)
        return self.policies
    place, own = next(iter(active.items()))
    shape = self.layers[place].shape(own, dtype, residual)
    trained = [
        part for groups in active.values() for own in groups.values() for one in own.adapters for part in (one.a, one.b)
    ]
    self.policies = self.budget.policies(shape, len(active), tokens, trained)
    return self.policies


def _compute_type(layer: FusedLayer, residual: torch.dtype) -> torch.dtype:
    """16 bits where the model is held in them; where somebody made its norms float32, as autocast or the 4-bit layers say."""
    if residual != torch.float32:
        return residual
    device = layer.norms[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    stored: torch.dtype = getattr(layer.groups["qkv"].bases[0], "compute_dtype", None) or residual
    return stored


def _largest(
    layers: Mapping[int, FusedLayer], active: Mapping[int, Mapping[str, Active]], tiles: int
) -> dict[str, int]:
    """Numbers that each slot of the workspace has to hold."""
    sizes: dict[str, int] = {}
    for place, own in active.items():
        for name, group in layers[place].groups.items():
            slot, ranks = SLOTS[name] if tiles > 1 else "wide", own[name].ranks
            sizes[slot] = max(sizes.get(slot, 0), (group.outputs + ranks) * (group.inputs + ranks))
            if tiles > 1:  # layers of larger tiles may have one only
                sizes["wide"] = max(sizes["wide"], (group.outputs + ranks) * (group.inputs + ranks))
    return sizes
