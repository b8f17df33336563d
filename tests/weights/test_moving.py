"""Moving a model while some of its modules stay."""

from __future__ import annotations

import torch

from nybble.engine.reader import base_layers
from nybble.weights.moving import move_all_but, stay
from tests.engine.test_engine import llama, load  # noqa: F401


def test_everything_moves_but_what_stays(llama):  # noqa: F811
    model = load(llama, device="cpu")
    backbone = model.get_base_model().model
    staying = [module for layer in backbone.layers for module in base_layers(layer)]
    model.get_base_model().hf_device_map = {"": "cpu"}
    move_all_but(model, staying, torch.device("meta"))
    assert model.get_base_model().hf_device_map == {"": torch.device("meta")}
    on_host = [name for name, part in model.named_parameters() if part.device.type == "cpu"]
    assert len(on_host) == len(staying)
    assert all(name.endswith("base_layer.weight") for name in on_host)
    assert {part.device.type for part in model.buffers()} == {"meta"}
    assert not any("_apply" in vars(module) for module in model.modules())


def test_a_module_that_stays_for_good_does_so_afterwards():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    stay(model[0])
    move_all_but(model, [model[0]], torch.device("meta"))
    model.to("meta")
    assert model[0].weight.device.type == "cpu"
    assert model[1].weight.device.type == "meta"
