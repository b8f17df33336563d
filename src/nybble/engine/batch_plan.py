"""What every layer does with one batch, planned once before the backbone runs."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from nybble.engine.attention.backend import Backend
from nybble.engine.attention.choice import AttentionChoice, choose
from nybble.engine.batch_layout import BatchLayout, UnsupportedBatch, has_branches, layout_of, tokens_of
from nybble.engine.branches import BranchedAttention
from nybble.engine.compute import check_layers, check_type, forms
from nybble.engine.fusion import BatchReport, Fusion
from nybble.engine.layer import BatchContext, FusedLayer, LayerCall, Shared, slots
from nybble.engine.layer_forward import CALLS
from nybble.engine.padding import PaddedAttention
from nybble.engine.workspace import MatrixForm
from nybble.errors import EngineError
from nybble.plan.policies import LADDER
from nybble.weights.projections import ProjectionGroup

NAMES = tuple(inspect.signature(LlamaModel.forward).parameters)[1:]


@dataclass(frozen=True)
class BatchPlan:
    """What every layer does with one batch; a layer without a call falls back to its original forward."""

    calls: Mapping[LlamaDecoderLayer, LayerCall]
    report: BatchReport


def begin_batch(backbone: LlamaModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook before the backbone runs: plan this batch for all layers, or leave it to their original forward."""
    fusion: Fusion = backbone.nybble_fusion
    if getattr(backbone, "_is_replica", False):
        raise EngineError(
            "torch.nn.DataParallel copies the layers to several devices, but the fused engine uses one",
            fix="CUDA_VISIBLE_DEVICES=0, or start one process per device: accelerate launch, torchrun",
        )
    kwargs = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    layers = list(backbone.layers)[: backbone.config.num_hidden_layers]
    with fusion.shared.exclusive():
        plan = _plan_and_report(fusion, backbone, layers, kwargs)
    kwargs[CALLS] = plan.calls
    if plan.calls:
        kwargs["use_cache"] = False
    if len(plan.calls) == len(layers):
        # No layer reads the mask. Transformers uses a mask of four dimensions as it is, so this one keeps it from
        # building a mask of length x length for packed rows: 14 GB at 120,000 tokens.
        kwargs["attention_mask"] = torch.empty(0, 0, 0, 0, device=tokens_of(kwargs).device)
    return (), kwargs


def _plan_and_report(
    fusion: Fusion, backbone: LlamaModel, layers: Sequence[LlamaDecoderLayer], kwargs: Mapping[str, Any]
) -> BatchPlan:
    """Plan a batch, record how it is computed, and warn about layers that are not fused.

    Raises:
        EngineError: a layer would fall back, and its weights are not on the device.
    """
    plan = plan_batch(fusion, backbone, layers, kwargs)
    if fusion.shared.streamed is not None and plan.report.refusals:
        raise EngineError(
            "the original forward of the decoder layers needs their weights on the device, but they are "
            f"{fusion.shared.streamed.copier.where}; the fused engine cannot compute this batch: {plan.report.refusals[0]}",
            fix='nybble.fuse(model, weights="device"), or a batch that it can compute (docs/engine.md); for generation '
            'use_cache=False (in TRL generation_kwargs={"use_cache": False})',
        )
    has_trained = torch.is_grad_enabled()
    if has_trained:
        for why in dict.fromkeys(plan.report.refusals):
            fusion.warn_once(f"decoder layers fall back to the original forward: {why}")
    if has_trained or not fusion.has_trained:
        fusion.last, fusion.has_trained = plan.report, has_trained
    _take_over_checkpointing(fusion, backbone, plan)
    return plan


def plan_batch(
    fusion: Fusion, backbone: LlamaModel, layers: Sequence[LlamaDecoderLayer], kwargs: Mapping[str, Any]
) -> BatchPlan:
    """What every layer does with this batch.

    Args:
        fusion: the backbone's.
        backbone: the one that is about to run.
        layers: those of its layers that it will call.
        kwargs: all arguments that it is called with.

    Raises:
        EngineError: the weights or the adapters are not where they should be, or branches that would fall back.
    """
    try:
        layout = _layout(backbone, kwargs)
    except UnsupportedBatch as why:
        if has_branches(kwargs):
            raise _cannot_branch(str(why)) from None
        fusion.shared.workspace.release()
        return BatchPlan({}, BatchReport(refusals=[str(why)] * len(layers)))
    fused, refusals = fusion.read(layers)
    if layout.branches is not None and refusals:
        raise _cannot_branch(refusals[0])
    if not fused:
        fusion.shared.workspace.release()
        return BatchPlan({}, BatchReport(refusals=refusals))
    embedded = kwargs.get("inputs_embeds")
    residual = backbone.embed_tokens.weight.dtype if embedded is None else embedded.dtype
    first = next(iter(fused.values()))
    device, sizes = first.norms[0].device, first.sizes
    if fusion.shared.device != device:  # fused before the model was moved
        if fusion.shared.streamed is not None:
            raise EngineError(
                f"the model was moved to {device} while its weights were {fusion.shared.streamed.copier.where} for "
                f"{fusion.shared.device}",
                fix="nybble.unfuse(model) before it is moved, and nybble.fuse afterwards",
            )
        fusion.shared, fusion.choices = Shared(device), {}
    if fusion.shared.streamed is not None:
        _check_adapters(fused.values(), device)
    dtype = _compute_type(first, residual)
    if dtype not in fusion.choices:
        fusion.choices[dtype] = choose(device, dtype, sizes.heads, sizes.key_heads, sizes.head_size)
    batch = BatchContext(layout.segments, _backend(fusion.choices[dtype], layout), dtype, fusion.shared)
    numbers = {layer: number for number, layer in enumerate(layers)}
    in_fp8 = _groups_in_fp8(fusion, backbone, fused, numbers, batch)
    if not torch.is_grad_enabled():
        _keep_for_backward(fusion, backbone, first, batch, residual)
    policies, cached = _share_memory(fusion, fused, in_fp8, batch, residual)
    tiles = {policy: batch.tiles(policy or LADDER[0]) for policy in set(policies)}
    formed = {layer: _forms(fused[layer], in_fp8[layer], batch) for layer in fused}
    if torch.is_grad_enabled():
        fusion.shared.workspace.cache([(group, form) for layer in cached for _, group, form in formed[layer]])
    _reserve(fusion.shared, itertools.chain.from_iterable(formed.values()), max(map(len, tiles.values())))
    seed = _seed(fused.values())
    calls = {
        layer: LayerCall(
            fused[layer], numbers[layer], batch, tiles[policy], policy, seed + 2**40 * index, in_fp8[layer]
        )
        for index, (layer, policy) in enumerate(zip(fused, policies, strict=True))
    }
    saved = [policy for policy in policies if policy is not None]
    return BatchPlan(calls, BatchReport(len(calls), refusals, saved, fusion.choices[dtype].reason, len(cached)))


def _layout(backbone: LlamaModel, kwargs: Mapping[str, Any]) -> BatchLayout:
    """The layout of a batch.

    Raises:
        UnsupportedBatch: the fused layers cannot compute it; they build no key-value cache. In training, only the argument
            use_cache=True counts as a request for one: config.use_cache is on by default, so it says nothing.
    """
    config, requested = backbone.config, kwargs.get("use_cache")
    use_cache = config.use_cache if requested is None else requested
    builds_cache = use_cache and not (backbone.training and backbone.gradient_checkpointing)  # Transformers' own rule
    if builds_cache and not (requested is None and backbone.training and torch.is_grad_enabled()):
        raise UnsupportedBatch("a key-value cache is built; pass use_cache=False to stay fused")
    switches = {"output_attentions": config.output_attentions, "is_causal": getattr(config, "is_causal", None)}
    layout = layout_of({**switches, **{name: value for name, value in kwargs.items() if value is not None}})
    if builds_cache and layout.is_packed:
        raise UnsupportedBatch(
            "rows are packed, which Transformers does not see while config.use_cache is on; pass use_cache=False"
        )
    return layout


def _cannot_branch(why: str) -> EngineError:
    return EngineError(
        "answers that share a prompt in one row need every decoder layer fused, as the original forward would take them for "
        f"separate sequences; but: {why}",
        fix="change that, or give each answer its own prompt (docs/engine.md)",
    )


def _check_adapters(layers: Iterable[FusedLayer], device: torch.device) -> None:
    """PEFT puts a new adapter beside its base layer's weight, which may be on the host.

    Raises:
        EngineError: an adapter is not on the device.
    """
    for part in itertools.chain.from_iterable(layer.parameters() for layer in layers):
        if part.device != device:
            raise EngineError(
                f"an adapter that was added while the weights were on the host is on {part.device}, not on {device}",
                fix=f'model.to("{device}"); the weights stay on the host',
            )


def _backend(choice: AttentionChoice, layout: BatchLayout) -> Backend:
    rows = choice.of(layout.segments)
    if layout.branches is not None:
        return BranchedAttention(rows, layout.branches)
    return rows if layout.padding is None else PaddedAttention(rows, choice.packed, layout.padding)


def _take_over_checkpointing(fusion: Fusion, backbone: LlamaModel, plan: BatchPlan) -> None:
    """Switch gradient checkpointing off for the fused layers, and on again for those that fall back.

    Fused layers recompute by their policy; a checkpoint around them would compute everything twice.
    """
    fusion.note_checkpointing(backbone)
    for layer in fusion.taken_over:
        layer.gradient_checkpointing = layer not in plan.calls
    if fusion.taken_over and plan.calls:
        fusion.warn_once(f"gradient checkpointing was on; the fused layers follow policy={fusion.policy!r} instead")


def _groups_in_fp8(
    fusion: Fusion,
    backbone: LlamaModel,
    layers: Mapping[LlamaDecoderLayer, FusedLayer],
    numbers: Mapping[LlamaDecoderLayer, int],
    batch: BatchContext,
) -> dict[LlamaDecoderLayer, frozenset[str]]:
    """The groups of each layer that this batch computes in fp8: none in evaluation without gradients, which shows what the
    adapter is worth in use.

    Raises:
        EngineError: fp8 suits neither the activations' type nor the shapes.
    """
    fp8 = fusion.fp8
    if fp8 is None or not (backbone.training or torch.is_grad_enabled()):
        return dict.fromkeys(layers, frozenset())
    check_type(batch.dtype, batch.shared.device)
    check_layers(layers, fp8, numbers)
    batch.fast = fp8.fast
    return {layer: fp8.groups(numbers[layer]) for layer in layers}


def _forms(
    layer: FusedLayer, in_fp8: frozenset[str], batch: BatchContext
) -> list[tuple[str, ProjectionGroup, MatrixForm[Any]]]:
    """The forms that this batch needs of a layer's matrices, with the group and its name."""
    return [
        (name, group, form)
        for name, group in layer.groups.items()
        for form in forms(batch.dtype, name in in_fp8, batch.shared.peaks)
    ]


def _share_memory(
    fusion: Fusion,
    fused: Mapping[LlamaDecoderLayer, FusedLayer],
    in_fp8: Mapping[LlamaDecoderLayer, frozenset[str]],
    batch: BatchContext,
    residual: torch.dtype,
) -> tuple[Sequence[str | None], Sequence[LlamaDecoderLayer]]:
    """The layers' policies, and the layers whose weights stay dequantised."""
    layers = list(fused.values())
    if not torch.is_grad_enabled():
        return [None] * len(layers), []
    if fusion.policy != "auto":
        return [fusion.policy] * len(layers), []
    shape = layers[0].shape(batch.dtype, residual, frozenset[str]().union(*in_fp8.values()))
    trained = [part for layer in layers for part in layer.parameters()]
    attention = batch.attention
    extra = attention.extra_bytes(shape) if isinstance(attention, PaddedAttention | BranchedAttention) else 0
    share = fusion.budget.share(shape, len(layers), batch.segments.tokens, trained, fusion.shared, extra)
    is_cacheable = fusion.shared.workspace.is_cacheable
    cacheable = [layer for layer, now in fused.items() if all(map(is_cacheable, now.groups.values()))]
    return share.policies, cacheable[: share.cached_layers]


def _keep_for_backward(
    fusion: Fusion, backbone: LlamaModel, layer: FusedLayer, batch: BatchContext, residual: torch.dtype
) -> None:
    """A batch without gradients: free the weights that stay dequantised, since evaluation and generation need the memory for
    other things. In training mode it is a reference's (DPO, KTO, GRPO), between a batch's forward and its backward, which would
    have to dequantise them again: there they stay if it fits beside them."""
    workspace = fusion.shared.workspace
    shape = layer.shape(batch.dtype, residual)
    if backbone.training and fusion.budget.fits_without_gradients(shape, batch.segments.tokens, fusion.shared.device):
        workspace.check()
    else:
        workspace.release()


def _compute_type(layer: FusedLayer, residual: torch.dtype) -> torch.dtype:
    """The type of the residual stream; where that is float32, autocast's type or the compute type of the 4-bit layers."""
    if residual != torch.float32:
        return residual
    device = layer.norms[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return layer.groups["qkv"].compute_dtype or residual


def _reserve(shared: Shared, formed: Iterable[tuple[str, ProjectionGroup, MatrixForm[Any]]], tiles: int) -> None:
    """Allocate for the largest group of each slot. Where some layers have several tiles, others may have only one."""
    sizes: Counter[str] = Counter()
    for name, group, form in formed:
        start, size = form.place(group)
        for slot in {slots(1)[name], slots(tiles)[name]}:
            sizes[slot] = max(sizes[slot], start + size)
    for slot, size in sizes.items():
        shared.workspace.reserve(slot, size)


def _seed(layers: Iterable[FusedLayer]) -> int:
    """A new seed for each batch with dropout; without dropout none is drawn, as in torch's own forward."""
    dropping = any(group.has_dropout for layer in layers for group in layer.groups.values())
    return int(torch.randint(2**62, ()).item()) if dropping else 0
