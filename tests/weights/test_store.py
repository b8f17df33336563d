"""Frozen weights as bitsandbytes holds and stores them, and the store that fills the engine's buffers with them."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, get_peft_model

from nybble.kernels.operations import choose
from nybble.weights.frozen import dequantised, float_tensors, is_quantised, scale_bytes
from nybble.weights.packed import move_weights
from nybble.weights.projections import read_group
from nybble.weights.store import ResidentStore
from nybble.weights.stored import (
    BESIDE,
    dequantise_rows,
    described_name,
    description_name,
    read_description,
    read_state,
)
from nybble.weights.watched import Watched

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("first", "second")
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("none", False)]


class Projections(torch.nn.Module):
    """Two projections that share an input of 128."""

    def __init__(self, kind, double, dtype):
        super().__init__()
        for name, outputs, seed in (("first", 42, 0), ("second", 123, 1)):
            weight = torch.randn(outputs, 128, generator=torch.Generator().manual_seed(seed)).to(dtype) / 10
            layer = torch.nn.Linear(128, outputs, bias=False)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            if kind != "none":
                layer = Linear4bit(128, outputs, bias=False, compute_dtype=dtype)
                layer.weight = Params4bit(
                    weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=layer
                )
            setattr(self, name, layer)


def numbers_of(layer):
    """By bitsandbytes' own arithmetic."""
    if isinstance(layer, Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind, double", KINDS)
def test_a_resident_store_writes_bitsandbytes_numbers_to_the_bit(kind, double, dtype):
    module = Projections(kind, double, dtype).to(DEVICE)
    group = read_group(Watched(), module, NAMES)
    expected = torch.cat([numbers_of(module.first), numbers_of(module.second)])
    whole = torch.full((165 + 3, 128 + 8), float("nan"), dtype=dtype, device=DEVICE)
    ResidentStore(choose(DEVICE).operations).write(group, whole[:165, :128])
    assert torch.equal(whole[:165, :128], expected)
    assert whole[165:].isnan().all()
    assert whole[:, 128:].isnan().all(), "nothing beside its view is written"
    assert all(weight.is_quantised == (kind != "none") for weight in group.frozen)


def test_weights_are_read_through_peft_s_layers():
    plain = Projections("nf4", True, torch.bfloat16).to(DEVICE)
    plain.is_loaded_in_4bit = True
    expected = torch.cat([numbers_of(plain.first), numbers_of(plain.second)])
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=list(NAMES)))
    group = read_group(Watched(), model.base_model.model, NAMES)
    out = torch.empty(165, 128, dtype=torch.bfloat16, device=DEVICE)
    ResidentStore(choose(DEVICE).operations).write(group, out)
    assert torch.equal(out, expected)
    assert [adapter.outputs for adapter in group.adapters] == [slice(0, 42), slice(42, 165)]


def test_writing_into_a_stored_weight_shows_in_the_versions():
    module = Projections("nf4", True, torch.bfloat16).to(DEVICE)
    group = read_group(Watched(), module, NAMES)
    versions = [[tensor._version for tensor in group.stored()]]
    module.load_state_dict({"first.weight": module.first.weight.data.roll(1)}, strict=False)
    versions.append([tensor._version for tensor in group.stored()])
    module.second.weight.quant_state.absmax.add_(1)
    versions.append([tensor._version for tensor in group.stored()])
    assert versions[0] != versions[1] != versions[2]


@pytest.mark.parametrize("kind, double", KINDS[:3])
def test_a_stored_weight_dequantises_like_the_loaded_one(kind, double):
    layer = Projections(kind, double, torch.bfloat16).to(DEVICE).second
    tensors = {f"second.{name}": tensor.cpu() for name, tensor in layer.state_dict().items()}
    described = description_name("second.weight", tensors)
    assert described == f"second.weight.quant_state.bitsandbytes__{kind}"
    packed = read_description(described, tensors[described])
    assert packed.shape == [123, 128]
    sizes = {name: tensor.nbytes for name, tensor in tensors.items() if name != described}
    assert packed.part_bytes("second.weight") == sizes
    assert {described_name(name) for name in tensors} == {"second.weight"}
    assert all(name.endswith(BESIDE) for name in tensors if name != "second.weight")
    state = read_state("second.weight", tensors)
    rows = dequantise_rows(tensors["second.weight"], state, [slice(0, 64), slice(64, 123)], DEVICE)
    assert torch.equal(torch.cat(list(rows)), dequantised(layer))
    assert read_state("first.weight", tensors) is None


@pytest.mark.parametrize("kind, double", KINDS)
def test_all_tensors_of_a_weight_move_together(kind, double):
    module = Projections(kind, double, torch.bfloat16).to(DEVICE)
    before = [tensor for weight in read_group(Watched(), module, NAMES).frozen for tensor in weight.every_tensor()]
    assert len(before) == 2 * (2 if kind == "none" else 6 if double else 3)
    for copy in (False, True):
        move_weights([module.first, module.second], DEVICE, copy=copy)
        after = [tensor for weight in read_group(Watched(), module, NAMES).frozen for tensor in weight.every_tensor()]
        assert all(map(torch.equal, before, after))
        places = [{tensor.data_ptr() for tensor in tensors} for tensors in (before, after)]
        assert places[0].isdisjoint(places[1]) == copy
    move_weights([module.first, module.second], torch.device("cpu"))
    assert {part.device.type for part in module.state_dict().values()} == {"cpu"}


def test_a_damaged_description_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="it does not describe a 4-bit weight"):
        read_description("weight.quant_state.bitsandbytes__nf4", torch.zeros(5, dtype=torch.uint8))
    layer = Projections("nf4", True, torch.bfloat16).to(DEVICE).first
    state = layer.state_dict()["weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(ValueError, match="it describes a weight that bitsandbytes does not know"):
        read_description("weight.quant_state.bitsandbytes__fp4", state.cpu())


def test_a_model_s_numbers_are_those_that_can_be_infinite():
    module = Projections("nf4", True, torch.bfloat16).to(DEVICE)
    module.plain = torch.nn.Linear(8, 8, bias=False)
    module.eighth = Linear8bitLt(64, 8, bias=False, has_fp16_weights=False)
    module.eighth.load_state_dict({"weight": torch.ones(8, 64)})
    module.eighth.to(DEVICE)
    assert [is_quantised(layer) for layer in (module.first, module.plain, module.eighth)] == [True, False, True]
    names = [name for name, tensor in float_tensors(module) if tensor.is_floating_point()]
    assert names.count("first.weight") == 2, "offset, and the scales of the scales"
    assert names.count("plain.weight") == 1
    assert names.count("eighth.weight") == 1, "the scales of its rows"
    blocks = 42 * 128 // 64
    assert scale_bytes(module.first.weight) == blocks + 4 * -(-blocks // 256)
    assert scale_bytes(module.plain.weight) == 0
