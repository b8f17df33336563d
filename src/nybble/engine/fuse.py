"""The only entry: `fuse` gives the decoder layers of a model a faster forward and backward, `unfuse` removes them.

Only the `forward` of the layers and of the final norm is shadowed, on these instances, and a hook before the backbone
(LlamaModel) reads a batch's layout once for all layers. Modules, parameters, state dicts and adapters stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed
from peft.tuners.lora.layer import LoraLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from nybble.couplings.check import first_incompatibility
from nybble.distributed.data_parallel import leave_out
from nybble.distributed.group import group_size, in_group
from nybble.engine.batch_plan import begin_batch
from nybble.engine.compute import IN_16_BITS, Compute, Fast, Fp8Choice, check_layers, choose_fp8
from nybble.engine.embedding import EmbeddingOnHost
from nybble.engine.final_norm import FinalNorm
from nybble.engine.fusion import BatchReport, Fusion, Policy
from nybble.engine.layer import Shared
from nybble.engine.layer_forward import forward, has_fused_forward
from nybble.engine.memory import Budget
from nybble.engine.reader import LayerReader, base_layers
from nybble.errors import EngineError
from nybble.installed import pip
from nybble.kernels.operations import choose
from nybble.plan.policies import LADDER
from nybble.weights.copier import Copier, CudaCopier
from nybble.weights.moving import move_all_but
from nybble.weights.on_cpu import stay_unpacked
from nybble.weights.sharded import ShardCopier
from nybble.weights.streamed import StreamedStore, Streaming
from nybble.weights.watched import Ineligible

WeightPlace = Literal["device", "host", "sharded", "sharded-host"]


def fuse(
    model: torch.nn.Module,
    policy: Policy = "auto",
    *,
    embedding: Literal["device", "host"] = "device",
    weights: WeightPlace = "device",
    resident_layers: int = 0,
    compute: Compute = "bf16",
    fp8_skip: Sequence[str] = (),
    fp8_fast: Fast = "both",
) -> Any:
    """Compute a model's decoder layers with the fused engine, in place.

    Args:
        model: a PEFT model with LoRA, or what a trainer wraps it in, or a base that gets its adapter later. The base is of
            the Llama architecture, in NF4, FP4 or 16 bits. Adapters stay PEFT's: saved, loaded, switched and disabled
            as before. A layer with something that the engine does not support falls back to its original forward, and a
            warning and `fusion(model).describe()` say what it is (docs/engine.md has the full list). Several threads may
            call the model; they take turns layer by layer.
        policy: what each layer keeps for backward. auto picks the fastest mix that fits into free memory, and keeps weights
            dequantised where memory is left, until a forward in evaluation mode or `unfuse`.
            keep-all, drop-mlp, drop-qkv, layer-input and host go from the fastest to the leanest.
        embedding: where the token embedding's frozen weight is stored; host saves its memory on the device (0.26 GB for
            Llama 2) and costs a small copy per batch.
        weights: where the decoder layers' frozen weights are stored. host moves them to pinned host memory, and copies each
            layer's to one of two buffers on the device while the layer before is computed: 0.2 GB instead of 3.3 for
            Llama 2 7B in NF4. A model that does not fit on the device may be on the CPU: everything but these weights is
            then moved to the current CUDA device. Nothing can fall back to the original forward: what would is an error.
            sharded spreads each layer's bytes over the ranks of torch.distributed's process group, and gathers them on all
            ranks while the layer before is computed; sharded-host keeps the shares in pinned memory of the hosts. All ranks
            call `fuse` together, and run as many forward passes as the others, except within
            `nybble.engine.fusion.uneven_passes(model)`. `unfuse` brings the weights together again; until then the layers'
            own parameters are not numbers. After an error the model must be loaded again.
        resident_layers: where weights are not on the device, how many layers' are there all the same, spread evenly: in micro
            batches of fewer than about 2,000 tokens the others' copies take longer than the computation.
        compute: bf16 multiplies in the model's own 16-bit type. fp8 dequantises the frozen weights to e4m3 and multiplies on the
            fp8 matrix units of Ada, Hopper and Blackwell cards; adapters, norms, attention and head stay in bfloat16, and in
            evaluation mode without gradients so does everything else. fp8-if-possible falls back to bf16, and says why.
        fp8_skip: names of projections and layers that stay in 16 bits: down_proj, self_attn, layers.0, layers.31.mlp.
        fp8_fast: where fp8 sums are fast, which have fewer bits on Hopper: forward, backward, both or none.

    Returns:
        The same model. `fusion(model).describe()` says what was done.

    Raises:
        EngineError: no Llama backbone or several, layers spread over devices, an unknown policy, an embedding or weights
            that cannot stay on the host, more resident layers than could be streamed, a library that lacks something that
            the engine needs, or a card, a type or shapes that fp8 does not suit.
    """
    if weights == "device" and resident_layers:
        raise EngineError(
            'resident_layers is for weights="host" or "sharded": all weights are on the device',
            fix="leave resident_layers out",
        )
    _check_request(policy)
    backbone = _backbone(model)
    device = _device(backbone, weights)
    dtype = backbone.embed_tokens.weight.dtype
    fp8 = choose_fp8(compute, fp8_skip, fp8_fast, device, dtype, len(backbone.layers))
    if weights == "device":
        return attach(model, policy, embedding, fp8=fp8)
    _check_resident(resident_layers, len(backbone.layers))
    _check_place(weights, device)
    streaming = Streaming(_copier(weights, device), resident_layers)
    if backbone.norm.weight.device.type == device.type:
        attach(model, policy, embedding, streaming, fp8)
    else:
        _check_single_device(backbone)
        unfuse(model)
        readers = {layer: LayerReader(layer) for layer in backbone.layers}
        _refuse_layers_that_cannot_be_fused(readers, streaming.copier.where)
        with _moved_around(model, backbone, device, embedding):
            attach(model, policy, embedding, streaming, fp8)
    # DistributedDataParallel would refuse what is on the host, and stand-ins. Adapters stay: one may be trained later.
    kept = [backbone.embed_tokens, *itertools.chain.from_iterable(base_layers(layer) for layer in backbone.layers)]
    leave_out(model, [module.weight for module in kept])
    if device.type == "cuda":
        torch.cuda.empty_cache()  # otherwise the allocator keeps what the weights took, in blocks that activations do not fill
    return model


def attach(
    model: torch.nn.Module,
    policy: Policy,
    embedding: Literal["device", "host"],
    streaming: Streaming | None = None,
    fp8: Fp8Choice = IN_16_BITS,
) -> Any:
    """As `fuse`, which chooses how weights are streamed.

    Args:
        model: see `fuse`.
        policy: see `fuse`.
        embedding: see `fuse`.
        streaming: what copies the weights of layers to the device, and how many layers stay there; None for all.
        fp8: what is computed in fp8, whatever the device.

    Raises:
        EngineError: see `fuse`.
    """
    _check_request(policy)
    backbone = _backbone(model)
    _check_single_device(backbone)
    hooks: list[Any] = _kept_store(backbone, streaming)
    unfuse(model)
    device = backbone.norm.weight.device
    if device.type == "cpu":
        stay_unpacked(model)
    readers = {layer: LayerReader(layer) for layer in backbone.layers}
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, backbone, hooks)
        shared = Shared(device, _streamed_store(readers, streaming, hooks))
        if embedding == "host":
            hooks.append(EmbeddingOnHost(backbone, device))
        hooks.append(FinalNorm(backbone.norm))
        config = backbone.config
        budget = Budget(config.vocab_size, config.hidden_size)
        result = Fusion(policy, readers, budget, shared, fp8.fp8, fp8.missing, hooks=hooks)
        backbone.nybble_fusion = result
        for layer in readers:
            layer.forward = types.MethodType(forward, layer)
        hooks.append(backbone.register_forward_pre_hook(begin_batch, with_kwargs=True))
        fused, refusals = result.read(list(readers))
        if fp8.fp8 is not None:
            check_layers(fused, fp8.fp8, {layer: number for number, layer in enumerate(readers)})
        undo.pop_all()
    result.last = BatchReport(len(fused), refusals)
    if fp8.missing:
        result.warn_once(fp8.missing)
    has_adapter = any(isinstance(module, LoraLayer) for module in backbone.modules())
    later = "" if has_adapter else " (there is no adapter yet; PEFT freezes the base when it adds one)"
    for refusal, count in Counter(refusals).items():
        result.warn_once(f"{count} of {len(readers)} decoder layers keep their original forward: {refusal}{later}")
    return model


def unfuse(model: torch.nn.Module) -> Any:
    """Restore the layers' original forward and the checkpointing that `fuse` replaced; returns the model.

    Raises:
        EngineError: weights that are on the host do not fit on the device; the model stays fused.
    """
    backbone = _backbone(model)
    result: Fusion | None = backbone.__dict__.get("nybble_fusion")
    if result is not None:
        if (store := result.shared.streamed) is not None and store in result.hooks:
            store.remove()
            result.hooks.remove(store)
        for hook in result.hooks:
            hook.remove()
        _restore_forward(backbone)
        result.note_checkpointing(backbone)
        for layer in result.taken_over:
            layer.gradient_checkpointing = True
    return model


def fusion(model: torch.nn.Module) -> Fusion | None:
    """What `fuse` did to a model, or None."""
    result: Fusion | None = _backbone(model).__dict__.get("nybble_fusion")
    return result


@contextlib.contextmanager
def _moved_around(
    model: torch.nn.Module, backbone: LlamaModel, device: torch.device, embedding: Literal["device", "host"]
) -> Iterator[None]:
    """Move a model from the host to a device, except for what will stay on the host; after an error all of it is back."""
    staying = list(itertools.chain.from_iterable(base_layers(layer) for layer in backbone.layers))
    with contextlib.ExitStack() as undo:
        undo.callback(move_all_but, model, (), torch.device("cpu"))
        move_all_but(model, [*staying, backbone.embed_tokens] if embedding == "host" else staying, device)
        yield
        undo.pop_all()


def _put_back(backbone: LlamaModel, hooks: Sequence[Any]) -> None:
    """Undo a `fuse` that failed: weights go to where they came from, which may have been the host."""
    for hook in reversed(hooks):
        if isinstance(hook, StreamedStore):
            hook.put_back()
        else:
            hook.remove()
    _restore_forward(backbone)


def _restore_forward(backbone: LlamaModel) -> None:
    result: Fusion | None = backbone.__dict__.pop("nybble_fusion", None)
    for layer in () if result is None else result.readers:
        if has_fused_forward(layer):
            del layer.forward


def _kept_store(backbone: LlamaModel, streaming: Streaming | None) -> list[StreamedStore]:
    """The store of an earlier `fuse`, if it can serve. Otherwise its weights go to the host, not to the device, which may not
    have the memory for all of them."""
    previous: Fusion | None = backbone.__dict__.get("nybble_fusion")
    store = None if previous is None else previous.shared.streamed
    if previous is None or store is None or streaming is None:
        return []
    previous.hooks.remove(store)
    before = store.copier.device, store.copier.where, store.resident_layers
    if before == (streaming.copier.device, streaming.copier.where, streaming.resident_layers):
        return [store]
    store.remove(torch.device("cpu"))
    return []


def _streamed_store(
    readers: Mapping[LlamaDecoderLayer, LayerReader], streaming: Streaming | None, hooks: list[Any]
) -> StreamedStore | None:
    """The store of weights that are elsewhere, which is the first of the hooks; None where weights stay on the device.

    Raises:
        EngineError: a layer that cannot be fused, or too little memory.
    """
    if streaming is None:
        return None
    _refuse_layers_that_cannot_be_fused(readers, streaming.copier.where)
    layers = [base_layers(layer) for layer in readers]
    if hooks and hooks[0].layers != layers:
        hooks.pop().remove(torch.device("cpu"))
    if not hooks:
        hooks.append(StreamedStore(choose(streaming.copier.device).operations, layers, streaming))
    store: StreamedStore = hooks[0]
    return store


def _refuse_layers_that_cannot_be_fused(readers: Mapping[LlamaDecoderLayer, LayerReader], where: str) -> None:
    for number, reader in enumerate(readers.values()):
        try:
            reader.read()
        except Ineligible as why:
            raise EngineError(
                f"weights {where} need every decoder layer fused, but layer {number} cannot be: {why}",
                fix='weights="device" (in a recipe: engine.weights=device)',
            ) from None


def _backbone(model: torch.nn.Module) -> LlamaModel:
    backbones = [module for module in model.modules() if isinstance(module, LlamaModel)]
    if len(backbones) == 1:
        return backbones[0]
    raise EngineError(
        f"there are {len(backbones)} Llama backbones in {type(model).__name__}" if backbones else
        f"there is no Llama backbone in {type(model).__name__}",
        fix="fuse each model separately" if backbones else
        "nybble.fuse supports models of the Llama architecture (transformers' LlamaModel)",
    )  # fmt: skip


def _device(backbone: LlamaModel, weights: str) -> torch.device:
    """Where the layers will be computed."""
    device: torch.device = backbone.norm.weight.device
    moves = weights == "host" or (weights != "device" and in_group() and torch.distributed.get_backend() != "gloo")
    if moves and device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_place(weights: str, device: torch.device) -> None:
    if weights.startswith("sharded") and group_size() == 1:
        raise EngineError(
            f'weights="{weights}" spreads the weights over the ranks of a run, but this process runs alone',
            fix="nybble train --processes 2, or torchrun for a script of your own, with torch.distributed.init_process_group()",
        )
    if weights.endswith("host") and device.type == "cpu":
        raise EngineError(
            f'weights="{weights}" streams weights to a GPU, but the model is on a CPU: its weights are on the host already',
            fix='weights="device" (in a recipe: engine.weights=device)',
        )


def _copier(weights: str, device: torch.device) -> Copier:
    return CudaCopier(device) if weights == "host" else ShardCopier(device, on_host=weights == "sharded-host")


def _check_request(policy: str) -> None:
    if (problem := first_incompatibility("engine", "weights")) is not None:
        raise EngineError(problem.what, fix=f"{pip()} install {problem.requirement}")
    if policy != "auto" and policy not in LADDER:
        raise EngineError(f"there is no policy {policy!r}", fix=f"one of auto, {', '.join(reversed(LADDER))}")


def _check_resident(resident: int, layers: int) -> None:
    if not 0 <= resident < layers:
        raise EngineError(
            f"{resident} of {layers} layers cannot be resident while the others are streamed",
            fix=f'0 to {layers - 1}, or weights="device" (in a recipe: engine.resident_layers, engine.weights)',
        )


def _check_single_device(backbone: LlamaModel) -> None:
    for name, module in backbone.named_modules():
        if hasattr(module, "_hf_hook"):
            raise EngineError(
                f"{name or 'the model'} has Accelerate's hooks ({type(module._hf_hook).__name__}): its layers are spread "
                "over devices or offloaded, but the fused engine uses one device",
                fix='load the model with device_map={"": 0}',
            )
