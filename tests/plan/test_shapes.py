"""Shapes from a configuration alone, against real models of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import LlamaConfig, LlamaForCausalLM

from nybble.engine.fuse import fuse, fusion
from nybble.errors import ModelError
from nybble.model.adapter.lora import attach_adapter
from nybble.model.base.fields import check_fields
from nybble.plan.ledger import dequantised_bytes, workspace_bytes
from nybble.plan.shapes import LLAMA_2_7B, ModelShape, Projection, head_size
from nybble.recipe import LoraOptions
from tests.conftest import write_llama
from tests.engine.test_engine import batch_of, gradients, load

SMALL = {
    "vocab_size": 401,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
KINDS = {
    "every head its own": {},
    "grouped": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1, "num_attention_heads": 3},
    "tied": {"tie_word_embeddings": True},
    "wider heads": {"head_dim": 40, "num_key_value_heads": 3},
    "no head size": {"head_dim": None},
    "attention biases": {"attention_bias": True, "num_key_value_heads": 2},
    "MLP biases": {"mlp_bias": True},
}


def counted(model: torch.nn.Module, *ends: str) -> int:
    return sum(part.numel() for name, part in model.named_parameters() if name.endswith(ends))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind: str) -> None:
    config = {**SMALL, **KINDS[kind]}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    shape = ModelShape.from_config(config)
    assert shape == ModelShape.from_config(model.config.to_dict()), "what Transformers fills in is derived alike"
    found = shape.parameters
    assert found.total == sum(part.numel() for part in model.parameters())
    assert found.linears == counted(model, "proj.weight")
    assert found.norms == counted(model, "norm.weight")
    assert found.biases == counted(model, "bias")
    assert found.embedding == counted(model, "embed_tokens.weight")
    assert found.head == counted(model, "lm_head.weight")
    layer = dict(model.model.layers[0].named_modules())
    live = {name.split(".")[-1]: module for name, module in layer.items() if isinstance(module, torch.nn.Linear)}
    assert {name: (one.in_features, one.out_features) for name, one in live.items()} == dict(shape.projections)
    attention = model.model.layers[0].self_attn
    assert shape.head_size == attention.head_dim
    assert (shape.layers, shape.positions, shape.vocabulary) == (3, 512, 401)


def test_a_configuration_that_says_the_least() -> None:
    """As of the first Llamas: no key-value heads, no head size, no positions, nothing of tied embeddings."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    least = {name: SMALL[name] for name in names}
    shape = ModelShape.from_config(least)
    assert shape == ModelShape.from_config(LlamaConfig(**least).to_dict())
    assert (shape.key_value_heads, shape.head_size, shape.tied) == (6, 16, False)


def test_missing_fields_are_named_together() -> None:
    with pytest.raises(ModelError, match="no intermediate_size, vocab_size"):
        ModelShape.from_config({**SMALL, "intermediate_size": None, "vocab_size": None})


def test_the_head_size_is_derived_once(tmp_path) -> None:
    assert head_size({"hidden_size": 64, "num_attention_heads": 4}) == 16
    assert head_size({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}) == 8
    with pytest.raises(ModelError, match="head_dim is 15, and RoPE needs an even number"):
        check_fields(tmp_path / "config.json", {**SMALL, "hidden_size": 90})


def test_llama_2_7b() -> None:
    parameters = LLAMA_2_7B.parameters
    assert parameters.total == 6_738_415_616
    assert parameters.linears == 6_476_005_376
    assert LLAMA_2_7B.adapter_parameters(16, LLAMA_2_7B.projections) == 39_976_960
    assert LLAMA_2_7B.projections["down_proj"] == Projection(11008, 4096)


@pytest.mark.parametrize("options", [
    {"r": 8}, {"r": 5, "targets": ["q_proj", "v_proj"]}, {"r": 4, "targets": ["k_proj", "down_proj"], "dora": True},
], ids=str)  # fmt: skip
def test_an_adapter_s_parameters_are_those_that_peft_trains(tmp_path, options: dict[str, object]) -> None:
    model = LlamaForCausalLM.from_pretrained(write_llama(tmp_path / "llama", head_dim=24))
    shape = ModelShape.from_config(model.config.to_dict())
    tuned = attach_adapter(model, LoraOptions(**options))
    trained = sum(part.numel() for part in tuned.parameters() if part.requires_grad)
    targets = options.get("targets", shape.projections)
    assert shape.adapter_parameters(options["r"], targets, dora="dora" in options) == trained


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_layer_s_workspace_is_the_engine_s(tmp_path, monkeypatch, tiles: int) -> None:
    for name in ("WIDE_TILE", "MIDDLE_TILE", "NARROW_TILE"):
        monkeypatch.setattr(f"nybble.plan.policies.{name}", -(-2 * 37 // tiles))
    model = fuse(load(write_llama(tmp_path / "llama", head_dim=32, num_key_value_heads=1)), "layer-input")
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    gradients(model, batch_of())
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    buffers = fusion(model).shared.workspace._buffers.values()
    shape = layer.shape(torch.float32, torch.float32)
    assert workspace_bytes(shape, tiles) == sum(buffer.nbytes for buffer in buffers)
    assert workspace_bytes(shape, tiles) <= dequantised_bytes(shape)


def test_nothing_heavy_is_loaded() -> None:
    probe = (
        "import sys, nybble.plan.ledger, nybble.plan.shapes, nybble.plan.solver;"
        "print({'torch', 'transformers', 'bitsandbytes', 'psutil', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
