"""Merged weights are PEFT's, bit by bit and slice by slice; shards are safetensors'; memory does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nybble.errors import ModelError
from nybble.export.merge import shards
from nybble.export.merge.merge import HEAD, Dequantised, Merge, Original
from nybble.export.merge.shards import Spec, Tensors, slices_of, write_shards
from nybble.export.merge.updates import read_updates
from nybble.export.parity.compare import compare
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_base
from nybble.recipe import ModelOptions
from nybble.weights.frozen import linear4bits
from tests.conftest import write_llama

CPU = torch.device("cpu")


@pytest.fixture
def small_slices(monkeypatch):
    """So that a tiny model's tensors, too, come in several slices: the embedding, and those of 128 rows."""
    monkeypatch.setattr(shards, "SLICE", 64 * 64)


def adapter_of(base, folder, **options):
    """An adapter with random A and B, saved by PEFT, and the model it was saved from."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.1, 0.1)  # a magnitude, too, of any size
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["o_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 20, "layers.1.mlp.down_proj": 3},
         "rank_pattern": {"down_proj": 2}},
    ],
    ids=["all-linear", "rslora", "dora", "patterns"],
)  # fmt: skip
def test_merged_weights_are_those_of_peft(tiny_llama, tmp_path, small_slices, options):
    adapted = adapter_of(tiny_llama, tmp_path / "adapter", **options)
    merge = Merge(Original(tiny_llama), read_updates(tmp_path / "adapter"), False, torch.float32)
    expected = adapted.merge_and_unload().state_dict()
    assert {spec.name for spec in merge.specs()} == set(expected)
    changed = load_file(tiny_llama / "model.safetensors")
    for spec in merge.specs():
        ours = torch.cat(list(merge.slices(spec.name)))
        assert tuple(ours.shape) == spec.shape
        torch.testing.assert_close(ours, expected[spec.name].float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours, changed[spec.name]) == (spec.name not in merge.updates)


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8"])
def test_a_dequantised_base_is_what_bitsandbytes_makes_of_it(tiny_llama, tmp_path, cache, small_slices, kind):
    options = ModelOptions(quantization=kind.removesuffix("-single"), double_quantization=kind != "nf4-single")
    base = load_base(find_checkpoint(str(tiny_llama)), options, torch.bfloat16, CPU, tmp_path)
    (folder,) = (tmp_path / "base").iterdir()
    weights = Dequantised(folder)
    assert set(weights.names()) == set(Original(tiny_llama).names())
    if kind == "int8":
        layer = base.model.model.layers[0].mlp.up_proj
        ours = torch.cat(list(weights.slices("model.layers.0.mlp.up_proj.weight")))
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(layer(x).float(), x.float() @ ours.T, rtol=0.05, atol=0.02)
        return
    names = {id(module): name for name, module in base.model.named_modules()}
    seen = 0
    for module in linear4bits(base.model):
        whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        parts = list(weights.slices(f"{names[id(module)]}.weight"))
        assert torch.equal(torch.cat(parts), whole)
        assert parts[0].dtype == torch.bfloat16
        seen += len(parts) > 1  # gate and up of both layers
    assert seen == 4, "slices that begin in the middle of a weight"


@pytest.mark.parametrize("dora", [False, True])
def test_weights_are_merged_on_the_requested_device(tiny_llama, tmp_path, cache, small_slices, dora):
    """The device meta computes nothing and refuses tensors that are elsewhere; with a GPU the numbers are held, too."""
    adapter_of(tiny_llama, tmp_path / "adapter", target_modules="all-linear", use_dora=dora)
    updates = read_updates(tmp_path / "adapter")
    folders = [tiny_llama]
    for kind in ("nf4", "int8"):
        checkpoint, options = find_checkpoint(str(tiny_llama)), ModelOptions(quantization=kind)
        load_base(checkpoint, options, torch.bfloat16, CPU, tmp_path / kind)
        folders += (tmp_path / kind / "base").iterdir()
    for folder, weights in zip(folders, (Original, Dequantised, Dequantised), strict=True):
        merge = Merge(weights(folder), updates, False, torch.bfloat16)
        for spec in merge.specs():
            ours = list(merge.slices(spec.name))
            away = list(merge.slices(spec.name, torch.device("meta")))
            assert [(part.shape, part.dtype) for part in away] == [(part.shape, part.dtype) for part in ours]
            assert all(part.is_meta for part in away)
            if torch.cuda.is_available():
                there = torch.cat(list(merge.stored(spec.name, torch.device("cuda")))).cpu()
                torch.testing.assert_close(there, torch.cat(ours).bfloat16(), rtol=2**-7, atol=1e-6)


def test_old_checkpoints_in_bin_files_are_merged_too(tmp_path):
    folder = write_llama(tmp_path / "bin", safe=False)
    state = torch.load(folder / "pytorch_model.bin")
    torch.save({**state, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "pytorch_model.bin")
    adapter_of(write_llama(tmp_path / "safe"), tmp_path / "adapter", target_modules=["q_proj"])
    merge = Merge(Original(folder), read_updates(tmp_path / "adapter"), False, torch.bfloat16)
    assert {spec.name for spec in merge.specs()} == set(state)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_a_head_that_the_adapter_changes_is_untied_from_the_embedding(tmp_path):
    tied = write_llama(tmp_path / "tied", tie_word_embeddings=True)
    adapted = adapter_of(tied, tmp_path / "adapter", target_modules=["lm_head"])
    merge = Merge(Original(tied), read_updates(tmp_path / "adapter"), True, torch.float32)
    assert merge.unties
    ours = torch.cat(list(merge.slices(HEAD)))
    layer = adapted.get_base_model().lm_head
    torch.testing.assert_close(ours, layer.base_layer.weight + layer.get_delta_weight("default"))
    plain = Merge(Original(tied), {}, True, torch.float32)
    assert HEAD not in [spec.name for spec in plain.specs()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa"}, "initialised by PiSSA, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by PiSSA"),
        ({"init_lora_weights": "loftq"}, "initialised by LoftQ"),
        ({"init_lora_weights": "olora"}, "initialised by OLoRA"),
        ({"init_lora_weights": "corda"}, "initialised by CorDA"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save=['lm_head']"),
        ({"bias": "all"}, "sets bias='all'"),
        ({"ensure_weight_tying": True}, "sets ensure_weight_tying=True"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out=True"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
        ({"peft_type": "IA3"}, "the adapter is IA3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_adapters_that_change_the_base_or_are_not_lora_are_refused(tiny_llama, tmp_path, change, said):
    adapter_of(tiny_llama, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | change
    if change.get("peft_type") == "IA3":
        config = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj"], "feedforward_modules": []}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        read_updates(tmp_path)
    print(caught.value)
    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_pissa_adapter_that_was_converted_is_merged(tiny_llama, tmp_path):
    """PEFT converts it against its start: W + B A - B0 A0, a plain LoRA of twice the rank on the base as it was."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    adapted.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data += 0.1
    adapted.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merge = Merge(Original(tiny_llama), read_updates(tmp_path / "out"), False, torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted.get_base_model().get_submodule(name)
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(torch.cat(list(merge.slices(f"{name}.weight"))), expected, rtol=1e-4, atol=1e-5)


def test_eva_leaves_the_base_as_it_was_and_is_merged(tiny_llama, tmp_path):
    adapter_of(tiny_llama, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_config.json"
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | eva))
    assert len(read_updates(tmp_path)) == 2


def test_faults_of_an_adapter_are_reported(tiny_llama, tmp_path):
    adapter_of(tiny_llama, tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    other = write_llama(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(ModelError, match=r"does not fit this base: it updates .*q_proj") as caught:
        Merge(Original(other), read_updates(tmp_path), False, torch.bfloat16).specs()
    print(caught.value)
    from safetensors.torch import save_file

    half = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name or "lora_B" not in name}
    zero = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    odd = {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}
    nan = {name: tensor * (float("nan") if "layers.1" in name else 1) for name, tensor in tensors.items()}
    changes = [
        (half, "only one half of"),
        (zero, "every B"),
        (nan, r"layers.1.* contains NaN or infinity"),
        (odd, "not part of LoRA on a linear layer"),
    ]
    for change, said in changes:
        save_file(change, file)
        with pytest.raises(ModelError, match=said) as caught:
            read_updates(tmp_path)
        print(caught.value)
    file.write_bytes(whole)
    fields = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(json.dumps({**json.loads(fields), "lora_alpha": 0}))
    with pytest.raises(ModelError, match="or its alpha is"):
        read_updates(tmp_path)
    (tmp_path / "adapter_config.json").write_text(fields)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cut off") as caught:
        read_updates(tmp_path)
    assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(ModelError, match="no adapter weights"):
        read_updates(tmp_path)


def test_numbers_that_the_type_cannot_represent_are_refused(tmp_path):
    base = write_llama(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    updates = read_updates(tmp_path / "adapter")
    for update in updates.values():
        update.b.mul_(1e8)
    merge = Merge(Original(base), updates, False, torch.float16)
    with pytest.raises(ModelError, match="not finite in float16") as caught:
        list(merge.stored("model.layers.0.self_attn.q_proj.weight"))
    assert caught.value.fix == "--dtype bfloat16"
    for update in updates.values():
        update.b.mul_(float("nan"))
    with pytest.raises(ModelError, match="not finite") as caught:
        list(merge.stored("model.layers.0.self_attn.q_proj.weight"))
    assert "damaged" in caught.value.fix


shapes = st.one_of(st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 300), st.integers(1, 40)))


@settings(max_examples=30)
@given(
    tensors=st.lists(
        st.tuples(shapes, st.sampled_from([torch.bfloat16, torch.float16, torch.float32])), min_size=1, max_size=8
    ),
    shard=st.integers(100, 30_000),
)
def test_any_tensors_in_shards_of_any_size_are_read_back_by_safetensors(tmp_path_factory, tensors, shard):
    folder = tmp_path_factory.mktemp("shards")
    values = {f"t{n}": torch.randn(shape).to(dtype) for n, (shape, dtype) in enumerate(tensors)}
    specs = [Spec(name, tuple(value.shape), value.dtype) for name, value in values.items()]
    told = []
    write_shards(folder, specs, lambda name: iter(values[name].split(7)), told.append, shard)
    assert told[-1] == sum(spec.bytes for spec in specs)
    files = sorted(folder.glob("*.safetensors"))
    read = {}
    for file in files:
        own = load_file(file)
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own.values()) <= shard
        read |= own
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value) for name, value in values.items())
    index = folder / "model.safetensors.index.json"
    if len(files) > 1:
        places = json.loads(index.read_text())["weight_map"]
        assert set(places.values()) == {file.name for file in files}
        assert all(name in load_file(folder / place) for name, place in places.items())
    else:
        assert files[0].name == "model.safetensors"
        assert not index.exists()
    assert set(Tensors(files)) == set(values)


@given(rows=st.integers(1, 10_000), columns=st.integers(1, 100_000), multiple=st.sampled_from([1, 64, 128]))
def test_slices_cover_all_rows_and_stay_small(rows, columns, multiple):
    parts = list(slices_of(rows, columns, multiple))
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(rows))
    assert all(part.start % multiple == 0 for part in parts)
    assert max(part.stop - part.start for part in parts) * columns <= max(shards.SLICE, multiple * columns)


MEASURE = """
import json, pathlib, sys, threading, time, torch
from nybble.export.merge.merge import Dequantised, Merge, Original
from nybble.export.merge.shards import write_shards
from nybble.export.merge.updates import read_updates
from bench.merge import PeakAnon
base, kept, adapter, out = map(pathlib.Path, sys.argv[1:])
updates, found = read_updates(adapter), {}
for name, weights in (("original", Original(base)), ("dequantised", Dequantised(kept))):
    (out / name).mkdir(parents=True)
    merge = Merge(weights, updates, False, torch.bfloat16)
    with PeakAnon() as peak:
        write_shards(out / name, merge.specs(), merge.stored, lambda done: None)
    found[name] = [peak.before, peak.bytes]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """600 MB of weights, of which at most 200 MB stand in anonymous memory beside what the process had before."""
    from bench.merge import make_checkpoint
    from tests.conftest import ROOT

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_key_value_heads": 16, "vocab_size": 16000}  # fmt: skip
    size = make_checkpoint(tmp_path, shape)
    assert size > 500e6
    words = [tmp_path / "base", tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for name, (before, peak) in json.loads(done.stdout).items():
        print(name, before, peak)
        assert peak - before < 300e6
        assert peak < 1e9


def test_a_damaged_merge_is_far_from_the_run_and_the_two_bases_differ(peaky_run, peaky_llama, cache):
    from nybble.chat.loading import load_answerer
    from nybble.evaluate.rows import rows_of
    from nybble.export.finished_run import bases_of, open_finished_run

    source = open_finished_run(peaky_run, "auto", cache)
    answerer = load_answerer(source.run, cache)
    prepared, _ = rows_of(source.run, answerer.tokenizer, cache)
    rows = [{"input_ids": row["input_ids"], "trained": row["trained"]} for row in prepared.validation]
    updates = read_updates(source.run.adapter)
    bases = bases_of(source, cache)
    halved = {name: type(update)(update.a, update.b, update.scaling / 2) for name, update in updates.items()}
    merges = {name: Merge(weights, updates, False, torch.float32) for name, weights in bases.items()}
    merges["wrong"] = Merge(bases["dequantised"], halved, False, torch.float32)
    found = compare(answerer, merges, rows, "rows")
    kept = json.loads((peaky_run.folder / "summary.json").read_text())["validation_loss"]["kept"]
    assert found.perplexity == pytest.approx(torch.tensor(kept).exp().item(), rel=1e-4)
    assert found.closest == "dequantised"
    assert found.bases["dequantised"].kl == pytest.approx(0, abs=1e-6)
    assert found.bases["dequantised"].agreement == 1
    assert found.bases["original"].kl > 0.01
    assert found.bases["wrong"].kl > 0.1
    with torch.inference_mode():  # the layers are as they were
        ids = torch.tensor([rows[0]["input_ids"]])
        merged = AutoModelForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32)(ids).logits
        assert not torch.allclose(answerer.model(ids).logits, merged)
