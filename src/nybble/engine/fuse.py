"""The one seam: `fuse` gives the decoder layers of a model a faster forward and backward, `unfuse` takes them away.

Only the layers' `forward` is shadowed, on these instances, and a hook before the backbone (LlamaModel) reads once for all
layers what a batch looks like. Modules, parameters, state dicts and adapters stay as they are.
"""

from __future__ import annotations

import types
from collections import Counter
from typing import Any, Literal

import torch
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from nybble.engine import ops
from nybble.engine.budget import Budget
from nybble.engine.embedding import EmbeddingOnHost
from nybble.engine.fusion import Fusion, Policy, begin, forward
from nybble.engine.host import HostStore
from nybble.engine.layer import FusedLayer, Sizes
from nybble.engine.ops import Operations
from nybble.engine.projections import Group, Ineligible, Workspace
from nybble.errors import EngineError
from nybble.plan.activations import LADDER


def fuse(model: torch.nn.Module, policy: Policy = "auto", *, embedding: Literal["device", "host"] = "device") -> Any:
    """Compute a model's decoder layers with the fused engine, in place.

    Args:
        model: a PEFT model with LoRA, or what a trainer wraps it in, on a base of the Llama architecture in NF4, FP4 or
            16 bits. Adapters are PEFT's as before: saved, loaded, switched and disabled as ever.
        policy: what each layer keeps for backward: auto picks the fastest mix that fits into the memory that is free;
            keep-all, drop-mlp, drop-qkv, layer-input and host go from the fastest to the leanest.
        embedding: where the token embedding's frozen weight lies; host saves its memory on the device (0.26 GB for
            Llama 2) and costs a small copy a batch.

    Returns:
        The same model. `fusion(model).describe()` says what was done.

    Raises:
        EngineError: no Llama backbone, layers spread over devices, an unknown policy, or not one layer to fuse.
    """
    if policy != "auto" and policy not in LADDER:
        raise EngineError(f"there is no policy {policy!r}", fix=f"one of auto, {', '.join(reversed(LADDER))}")
    backbone = _backbone(model)
    _refuse_spread(backbone)
    unfuse(model)
    device = next(backbone.layers[0].parameters()).device
    operations, reason = ops.choose(device)
    workspace, store = Workspace(operations), HostStore(device)
    layers: dict[int, FusedLayer] = {}
    refused: dict[int, str] = {}
    for place, layer in enumerate(backbone.layers):
        try:
            layers[place] = _describe(layer, operations, workspace, store)
        except Ineligible as why:
            refused[place] = str(why)
    if not layers:
        raise EngineError(
            f"none of {len(refused)} decoder layers can be fused: {refused[0]}",
            fix="train without nybble.fuse, or take away what it names",
        )
    config = backbone.config
    result = Fusion(policy, layers, refused, reason, Budget(device, config.vocab_size, config.hidden_size))
    for refusal, count in Counter(refused.values()).items():
        result.tell(f"{count} of {len(backbone.layers)} decoder layers keep their own forward: {refusal}")
    for place in layers:
        layer = backbone.layers[place]
        layer.forward = types.MethodType(forward, layer)
    result.hooks.append(backbone.register_forward_pre_hook(begin, with_kwargs=True))
    if embedding == "host":
        result.hooks.append(EmbeddingOnHost(backbone, device))
    backbone.nybble_fusion = result
    return model


def unfuse(model: torch.nn.Module) -> Any:
    """Give a model's layers their own forward back, and the checkpointing that had been taken over; returns the model."""
    backbone = _backbone(model)
    result = backbone.__dict__.pop("nybble_fusion", None)
    if result is not None:
        for hook in result.hooks:
            hook.remove()
        for place in result.layers:
            del backbone.layers[place].forward
        for place in result.taken_over:
            backbone.layers[place].gradient_checkpointing = True
    return model


def fusion(model: torch.nn.Module) -> Fusion | None:
    """What `fuse` did to a model, or None."""
    found: Fusion | None = _backbone(model).__dict__.get("nybble_fusion")
    return found


def _backbone(model: torch.nn.Module) -> LlamaModel:
    for module in model.modules():
        if isinstance(module, LlamaModel):
            return module
    raise EngineError(
        f"there is no Llama backbone in {type(model).__name__}",
        fix="nybble.fuse knows models of the Llama architecture (transformers' LlamaModel)",
    )


def _refuse_spread(backbone: LlamaModel) -> None:
    for name, module in backbone.named_modules():
        if hasattr(module, "_hf_hook"):
            raise EngineError(
                f"{name or 'the model'} has Accelerate's hooks ({type(module._hf_hook).__name__}): its layers are spread "
                "over devices or offloaded, and the fused engine computes on one",
                fix='load the model with device_map={"": 0}',
            )


def _describe(layer: Any, operations: Operations, workspace: Workspace, store: HostStore) -> FusedLayer:
    """What the engine needs to know of a layer.

    Raises:
        Ineligible: with the first reason why the layer keeps its own forward.
    """
    if type(layer) is not LlamaDecoderLayer:
        raise Ineligible(f"{type(layer).__name__} is not a decoder layer of Llama")
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    for module, expected in ((attention, LlamaAttention), (mlp, LlamaMLP), *((norm, LlamaRMSNorm) for norm in norms)):
        if type(module) is not expected:
            raise Ineligible(f"{type(module).__name__} stands where {expected.__name__} was expected")
    config = attention.config
    if config.hidden_act != "silu":
        raise Ineligible(f"the activation is {config.hidden_act}, not silu")
    if config.attention_dropout:
        raise Ineligible(f"attention dropout of {config.attention_dropout}")
    if any(norm.weight.requires_grad for norm in norms):
        raise Ineligible("its norms are trained")
    if attention.head_dim % 2 or attention.head_dim > 256:
        raise Ineligible(f"heads of {attention.head_dim}; even sizes up to 256 are known")
    groups = {
        "qkv": Group(("q_proj", "k_proj", "v_proj"), (attention.q_proj, attention.k_proj, attention.v_proj)),
        "o": Group(("o_proj",), (attention.o_proj,)),
        "gate_up": Group(("gate_proj", "up_proj"), (mlp.gate_proj, mlp.up_proj)),
        "down": Group(("down_proj",), (mlp.down_proj,)),
    }
    sizes = Sizes(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        config.hidden_size,
        groups["down"].inputs,
        (norms[0].variance_epsilon, norms[1].variance_epsilon),
    )
    return FusedLayer(groups, (norms[0].weight, norms[1].weight), sizes, operations, workspace, store)
