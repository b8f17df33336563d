"""A fused model at work: what each batch meets in each layer, decided once before the backbone runs."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from nybble.engine import attention
from nybble.engine.batch import Layout, Unfit, layout_of, tokens_of
from nybble.engine.layer import Batch, Call, FusedLayer, Shared, slots
from nybble.engine.memory import Budget
from nybble.engine.padding import Padded
from nybble.engine.passes import LayerFunction
from nybble.engine.reader import LayerReader
from nybble.engine.workspace import may_stand
from nybble.errors import EngineError
from nybble.plan.policies import LADDER
from nybble.weights.projections import Ineligible

Policy = Literal["auto", "keep-all", "drop-mlp", "drop-qkv", "layer-input", "host"]
log = logging.getLogger("nybble")
PASS = "nybble_pass"  # the keyword that the backbone hands through to its layers
NAMES = tuple(inspect.signature(LlamaModel.forward).parameters)[1:]


@dataclass(frozen=True)
class Met:
    """What the layers of a model met in one batch, for reports."""

    fused: int = 0
    passed: Sequence[str] = ()
    """Of each layer that went its own way, why."""
    policies: Sequence[str] = ()
    """What each fused layer kept."""
    attention: str = ""
    standing: int = 0
    """Layers whose weights stayed dequantised."""


@dataclass(frozen=True)
class Plan:
    """What every layer does with one batch; those without a call go their own way."""

    calls: Mapping[LlamaDecoderLayer, Call]
    met: Met


@dataclass
class Fusion:
    """A model's engine: what was asked for, what all layers share, and what the last batch met."""

    policy: Policy
    readers: dict[LlamaDecoderLayer, LayerReader]
    budget: Budget
    shared: Shared
    last: Met = field(default_factory=Met)
    """Of the last batch that was trained on; of the last one before any was."""
    has_trained: bool = False
    choices: dict[torch.dtype, attention.Choice] = field(default_factory=dict)
    """Attention's backends by compute type."""
    notices: list[str] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    taken_over: set[LlamaDecoderLayer] = field(default_factory=set)
    """Layers whose checkpointing somebody had switched on."""
    checkpointed: bool = False
    """Whether it was on for the whole backbone when last seen."""

    @property
    def fused(self) -> int:
        """Layers that the last batch met fused."""
        return self.last.fused

    @property
    def fallen_back(self) -> int:
        """Layers that the last batch met unfused."""
        return len(self.last.passed)

    def describe(self) -> str:
        """Layers, operations, attention, policies and refusals, a line each."""
        total = self.fused + self.fallen_back
        lines = [f"{self.fused} of {total} decoder layers fused; {self.shared.reason}"]
        if self.last.attention:
            lines.append(f"attention: {self.last.attention}")
        if self.last.policies:
            lines.append(f"kept for backward: {self.kept_words()}")
        if self.last.standing:
            lines.append(f"spare memory keeps the weights of {self.last.standing} layers dequantised")
        return "\n".join([*lines, *(f"{n} not fused: {why}" for why, n in Counter(self.last.passed).items())])

    def kept_words(self) -> str:
        """The last batch's policies, counted."""
        counts = Counter(self.last.policies)
        return ", ".join(f"{counts[name]} x {name}" for name in LADDER if counts[name])

    def read(self, layers: Sequence[LlamaDecoderLayer]) -> tuple[dict[LlamaDecoderLayer, FusedLayer], list[str]]:
        """The layers as they are now, and of those that cannot be fused why."""
        found: dict[LlamaDecoderLayer, FusedLayer] = {}
        passed: list[str] = []
        for layer in layers:
            try:
                found[layer] = self._read(layer)
            except Ineligible as why:
                passed.append(str(why))
        return found, passed

    def _read(self, layer: LlamaDecoderLayer) -> FusedLayer:
        reader = self.readers.get(layer)
        if reader is None or not self.is_ours(layer):
            raise Ineligible("its forward was replaced after nybble.fuse; fuse again")
        return reader.read()

    def is_ours(self, layer: LlamaDecoderLayer) -> bool:
        """Whether the layer still has the forward that `fuse` gave it: a model that was pickled has not."""
        return getattr(layer.__dict__.get("forward"), "__func__", None) is forward

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
    fused: torch.Tensor = LayerFunction.apply(hidden_states, call, *call.layer.parameters())  # type: ignore[no-untyped-call]
    return fused


def begin(backbone: LlamaModel, words: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Hook before the backbone runs: plan this batch for all layers, or leave it to them."""
    self: Fusion = backbone.nybble_fusion
    if getattr(backbone, "_is_replica", False):
        raise EngineError(
            "torch.nn.DataParallel copies the layers to several devices, but the fused engine uses one",
            fix="CUDA_VISIBLE_DEVICES=0, or start one process a device: accelerate launch, torchrun",
        )
    keywords = {**dict(zip(NAMES, words, strict=False)), **keywords}
    layers = list(backbone.layers)[: backbone.config.num_hidden_layers]
    with self.shared.turn():
        plan = _meet(self, backbone, layers, keywords)
    keywords[PASS] = plan.calls
    if plan.calls:
        keywords["use_cache"] = False
    if len(plan.calls) == len(layers):
        # No layer reads the mask. Transformers takes one of four dimensions as it is, and so builds none of
        # length x length for packed rows: 14 GB at 120,000 tokens.
        keywords["attention_mask"] = torch.empty(0, 0, 0, 0, device=tokens_of(keywords).device)
    return (), keywords


def _meet(self: Fusion, backbone: LlamaModel, layers: Sequence[LlamaDecoderLayer], keywords: Mapping[str, Any]) -> Plan:
    """Plan a batch, and remember and tell what it met."""
    if not torch.is_grad_enabled():  # evaluation and generation have other uses for the memory
        self.shared.workspace.release()
    plan = _plan(self, backbone, layers, keywords)
    has_trained = torch.is_grad_enabled()
    if has_trained:
        for why in dict.fromkeys(plan.met.passed):
            self.tell(f"decoder layers fall back to the original forward: {why}")
    if has_trained or not self.has_trained:
        self.last, self.has_trained = plan.met, has_trained
    _take_over(self, backbone, plan)
    return plan


def _layout(backbone: LlamaModel, keywords: Mapping[str, Any]) -> Layout:
    """What a batch looks like.

    Raises:
        Unfit: it is not for the fused layers, which build no key-value cache. In training one is asked for by use_cache=True
            only: config.use_cache is on wherever nobody thought of it.
    """
    config, asked = backbone.config, keywords.get("use_cache")
    wanted = config.use_cache if asked is None else asked
    builds = wanted and not (backbone.training and backbone.gradient_checkpointing)  # Transformers' own rule
    if builds and not (asked is None and backbone.training and torch.is_grad_enabled()):
        raise Unfit("a key-value cache is built; pass use_cache=False to stay fused")
    switches = {"output_attentions": config.output_attentions, "is_causal": getattr(config, "is_causal", None)}
    layout = layout_of({**switches, **{name: word for name, word in keywords.items() if word is not None}})
    if builds and layout.is_packed:
        raise Unfit(
            "rows are packed, which Transformers does not see while config.use_cache is on; pass use_cache=False"
        )
    return layout


def _plan(self: Fusion, backbone: LlamaModel, layers: Sequence[LlamaDecoderLayer], keywords: Mapping[str, Any]) -> Plan:
    """What every layer does with this batch."""
    try:
        layout = _layout(backbone, keywords)
    except Unfit as why:
        self.shared.workspace.release()
        return Plan({}, Met(passed=[str(why)] * len(layers)))
    found, passed = self.read(layers)
    if not found:
        self.shared.workspace.release()
        return Plan({}, Met(passed=passed))
    embedded = keywords.get("inputs_embeds")
    residual = backbone.embed_tokens.weight.dtype if embedded is None else embedded.dtype
    first = next(iter(found.values()))
    device, sizes = first.norms[0].device, first.sizes
    if self.shared.device != device:  # fused before the model was moved
        self.shared, self.choices = Shared(device), {}
    dtype = _compute_type(first, residual)
    if dtype not in self.choices:
        self.choices[dtype] = attention.choose(device, dtype, sizes.heads, sizes.key_heads, sizes.head_size)
    batch = Batch(layout.segments, _backend(self.choices[dtype], layout), dtype, self.shared)
    policies, standing = _share(self, list(found.values()), batch, residual)
    tiles = {policy: batch.tiles(policy or LADDER[0]) for policy in set(policies)}
    self.shared.workspace.keep([group for layer in standing for group in layer.groups.values()], dtype)
    _reserve(self.shared, list(found.values()), max(map(len, tiles.values())), dtype)
    seed = _seed(found.values())
    calls = {
        layer: Call(found[layer], batch, tiles[policy], policy, seed + 2**40 * place)
        for place, (layer, policy) in enumerate(zip(found, policies, strict=True))
    }
    kept = [policy for policy in policies if policy is not None]
    return Plan(calls, Met(len(calls), passed, kept, self.choices[dtype].reason, len(standing)))


def _backend(choice: attention.Choice, layout: Layout) -> attention.Backend:
    rows = choice.of(layout.segments)
    return rows if layout.padding is None else Padded(rows, choice.packed, layout.padding)


def _take_over(self: Fusion, backbone: LlamaModel, plan: Plan) -> None:
    """Fused layers recompute by their policy; a checkpoint around them would compute everything twice. Layers that go
    their own way get the checkpointing back that somebody wanted."""
    see_checkpointing(self, backbone)
    for layer in self.taken_over:
        layer.gradient_checkpointing = layer not in plan.calls
    if self.taken_over and plan.calls:
        self.tell(f"gradient checkpointing was on; the fused layers follow policy={self.policy!r} instead")


def see_checkpointing(self: Fusion, backbone: LlamaModel) -> None:
    """Learn what somebody switched on or off since the last batch."""
    whole = bool(getattr(backbone, "gradient_checkpointing", False))
    if self.checkpointed and not whole:
        self.taken_over.clear()
    self.checkpointed = whole
    self.taken_over |= {layer for layer in self.readers if getattr(layer, "gradient_checkpointing", False)}


def _share(
    self: Fusion, layers: Sequence[FusedLayer], batch: Batch, residual: torch.dtype
) -> tuple[Sequence[str | None], Sequence[FusedLayer]]:
    """The layers' policies, and those whose weights stay dequantised."""
    if not torch.is_grad_enabled():
        return [None] * len(layers), []
    if self.policy != "auto":
        return [self.policy] * len(layers), []
    shape = layers[0].shape(batch.dtype, residual)
    trained = [part for layer in layers for part in layer.parameters()]
    beside = batch.attention.passing_bytes(shape) if isinstance(batch.attention, Padded) else 0
    share = self.budget.share(shape, len(layers), batch.segments.tokens, trained, self.shared, beside)
    able = [layer for layer in layers if all(map(may_stand, layer.groups.values()))]
    return share.policies, able[: share.standing]


def _compute_type(layer: FusedLayer, residual: torch.dtype) -> torch.dtype:
    """16 bits where the model is held in them; where somebody made its norms float32, as autocast or the 4-bit layers say."""
    if residual != torch.float32:
        return residual
    device = layer.norms[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return layer.groups["qkv"].compute_dtype or residual


def _reserve(shared: Shared, layers: Sequence[FusedLayer], tiles: int, dtype: torch.dtype) -> None:
    """Room for the largest group of each slot; where some layers have several tiles, others may have one."""
    sizes: Counter[str] = Counter()
    for layer in layers:
        for name, group in layer.groups.items():
            numbers = (group.outputs + group.ranks) * (group.inputs + group.ranks)
            for slot in {slots(1)[name], slots(tiles)[name]}:
                sizes[slot] = max(sizes[slot], numbers)
    for slot, numbers in sizes.items():
        shared.workspace.reserve(slot, numbers, dtype)


def _seed(layers: Any) -> int:
    """A new one for each batch whose inputs are dropped; none is drawn where torch's own forward would draw none."""
    dropping = any(group.dropping for layer in layers for group in layer.groups.values())
    return int(torch.randint(2**62, ()).item()) if dropping else 0
