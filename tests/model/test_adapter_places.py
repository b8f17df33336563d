"""Stored adapters of every kind that is taken: as PEFT itself loads them, alone, beside others, and to be trained on."""

from __future__ import annotations

import pathlib

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from nybble.errors import ModelError
from nybble.model.adapter.lora import add_adapter, load_adapter, resume_adapter
from nybble.model.adapter.updates import updates_of
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.recipe import ModelOptions
from tests.conftest import small_tokenizer, write_llama

IDS = torch.arange(3, 67).reshape(2, 32)
COPY = "base_model.model.model.embed_tokens.weight"
KINDS = {
    "all linear": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "head and embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "bias of B": {"target_modules": ["q_proj"], "lora_bias": True},
    "patterns": {"target_modules": r".*\.(q_proj|down_proj)", "rank_pattern": {"down_proj": 2},
                 "alpha_pattern": {"q_proj": 20}, "use_rslora": True},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
}  # fmt: skip


def base_of(folder, cache, quantization="nf4"):
    options = ModelOptions(path=str(folder), quantization=quantization)
    return load_base(find_checkpoint(str(folder)), options, torch.float32, torch.device("cpu"), cache).model


def stored(base, folder, **options):
    """An adapter with numbers of its own, written by PEFT."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.1, 0.1)
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def parameters(model):
    return {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'.* invalid shape")
def test_each_kind_is_loaded_as_by_peft_and_leaves_the_base_when_switched_off(options, tiny_llama, cache, tmp_path):
    folder = stored(base_of(tiny_llama, cache), tmp_path / "adapter", **options)
    peft = PeftModel.from_pretrained(base_of(tiny_llama, cache), str(folder))
    own, plain = load_adapter(base_of(tiny_llama, cache), folder), base_of(tiny_llama, cache)
    assert parameters(own) == parameters(peft)
    assert torch.equal(logits(own), logits(peft))
    assert not torch.equal(logits(own), logits(plain))
    with own.disable_adapter():
        assert torch.equal(logits(own), logits(plain))
    assert updates_of(own).zero == 0
    resumed = resume_adapter(base_of(tiny_llama, cache), str(folder))
    trained = PeftModel.from_pretrained(base_of(tiny_llama, cache), str(folder), is_trainable=True)
    assert parameters(resumed) == parameters(trained)
    resumed.save_pretrained(tmp_path / "again")
    then, now = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "again"))
    assert then.keys() == now.keys()
    assert all(torch.equal(then[name], now[name]) for name in then)
    assert resumed.peft_config["default"].init_lora_weights == options.get("init_lora_weights", True)


def test_dora_on_8_bits_keeps_its_base(tiny_llama, cache, tmp_path):
    folder = stored(base_of(tiny_llama, cache, "int8"), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    own = load_adapter(base_of(tiny_llama, cache, "int8"), folder)
    peft = PeftModel.from_pretrained(base_of(tiny_llama, cache, "int8"), str(folder))
    assert torch.equal(logits(own), logits(peft))


def test_adapters_that_share_a_base_do_not_change_it_for_each_other(tiny_llama, cache, tmp_path):
    folder = stored(base_of(tiny_llama, cache), tmp_path / "adapter", target_modules=["q_proj"])
    tensors, embedding = (
        load_file(folder / "adapter_model.safetensors"),
        base_of(tiny_llama, cache).get_input_embeddings().weight.data,
    )
    save_file({**tensors, COPY: embedding.clone()}, folder / "adapter_model.safetensors")
    model = load_adapter(base_of(tiny_llama, cache), folder)
    add_adapter(model, folder, "same")
    changed = embedding.clone()
    changed[399] += 1
    save_file({**tensors, COPY: changed}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="brings its own model") as caught:
        add_adapter(model, folder, "other")
    print(caught.value)
    assert torch.equal(load_adapter(base_of(tiny_llama, cache), folder).get_input_embeddings().weight, changed)


def test_what_changes_biases_of_the_base_is_refused(cache, tmp_path):
    biased = write_llama(tmp_path / "biased", attention_bias=True)
    small_tokenizer().save_pretrained(biased)
    folder = stored(base_of(biased, cache, "none"), tmp_path / "adapter", target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(ModelError, match="of the base itself") as caught:
        load_adapter(base_of(biased, cache, "none"), folder)
    print(caught.value)
    assert "bias=lora_only" in caught.value.what


def test_the_file_may_change_under_a_loaded_adapter(tiny_llama, cache, tmp_path):
    """Tensors are mapped from the file when they are read, and must be copies in the model."""
    folder = stored(base_of(tiny_llama, cache), tmp_path / "adapter", target_modules=["q_proj"])
    model = load_adapter(base_of(tiny_llama, cache), folder)
    before = logits(model)
    file: pathlib.Path = folder / "adapter_model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(200)
    assert torch.equal(logits(model), before)
