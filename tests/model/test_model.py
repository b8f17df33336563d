"""Finding, refusing, quantising and adapting base models."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from nybble.chat.loading import load_answerer
from nybble.errors import DeviceError, ModelError
from nybble.model.adapter.lora import (
    add_adapter,
    attach_adapter,
    check_gradients,
    check_saved,
    load_adapter,
    read_adapter_config,
    resume_adapter,
)
from nybble.model.base.checkpoint import check_length, find_checkpoint, fingerprint
from nybble.model.base.load import load_base, load_config, measure
from nybble.model.device import choose_device, choose_dtype
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.free_memory import Memory
from nybble.preflight.data_check import load_tokenizer_and_config
from nybble.preflight.doctor.access import base_model
from nybble.recipe import LoraOptions, ModelOptions, load_recipe
from nybble.run.folder import open_run
from nybble.weights.frozen import linear4bits
from nybble.weights.on_cpu import dequantise_if_it_fits
from tests.conftest import SHARED, small_tokenizer, write_llama

CPU = torch.device("cpu")


def base_of(folder, cache, dtype=torch.float32, **options):
    return load_base(find_checkpoint(str(folder)), ModelOptions(path=str(folder), **options), dtype, CPU, cache)


def loss_of(model, dtype=torch.float32):
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids, labels=ids).loss


def test_a_base_is_quantised_once_and_read_from_the_cache_next_time(tiny_llama, tmp_path):
    first, second = base_of(tiny_llama, tmp_path), base_of(tiny_llama, tmp_path)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert loss_of(first.model) == loss_of(second.model)
    assert second.model.name_or_path == str(tiny_llama), "the adapter would name the cache as its base"
    size = measure(second.model)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert (size.quantized, size.parameters) == (linears, sum(p.numel() for p in base_of_16(tiny_llama, tmp_path)))
    assert size.bytes < 4 * (size.parameters - size.quantized) + 0.6 * size.quantized


def base_of_16(folder, cache):
    return base_of(folder, cache, quantization="none").model.parameters()


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
def test_every_storage_trains(tiny_llama, cache, quantization):
    base = base_of(tiny_llama, cache, quantization=quantization)
    model = attach_adapter(base.model, LoraOptions())
    loss_of(model).backward()
    check_gradients(model, first=True)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n), "the base is not frozen"


def test_int8_trains_in_bfloat16(tiny_llama, cache):
    model = attach_adapter(base_of(tiny_llama, cache, torch.bfloat16, quantization="int8").model, LoraOptions())
    loss_of(model, torch.bfloat16).backward()
    check_gradients(model, first=True)


@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True}, {"init": "gaussian"}])
def test_every_kind_of_adapter_leaves_the_base_as_it_was_at_first(tiny_llama, cache, options):
    base = base_of(tiny_llama, cache)
    before = loss_of(base.model)
    model = attach_adapter(base.model, LoraOptions(**options))
    torch.testing.assert_close(loss_of(model), before, rtol=1e-4, atol=1e-4)


def test_a_float16_llama2_is_loaded_in_the_requested_type(llama2_like, tmp_path):
    """Both tokenizer classes, .bin and safetensors, and a generation_config that cannot be saved as it is."""
    tokenizer = load_tokenizer(llama2_like)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    for _ in range(2):
        base = base_of(llama2_like, tmp_path, torch.bfloat16)
        kinds = {parameter.dtype for parameter in base.model.parameters()}
        assert kinds == {torch.bfloat16, torch.uint8}
    assert base.from_cache
    assert base.model.generation_config.eos_token_id == 2


def test_a_quantised_checkpoint_is_used_unchanged(tiny_llama, tmp_path):
    base_of(tiny_llama, tmp_path)
    (stored,) = (tmp_path / "base").iterdir()
    base = base_of(stored, tmp_path / "other", double_quantization=False)
    assert base.quantization == "nf4"
    assert not (tmp_path / "other" / "base").exists(), "what is quantised already needs no cache"
    with pytest.raises(ModelError) as caught:
        base_of(stored, tmp_path, quantization="int8")
    print(caught.value)
    assert "is already quantised as nf4" in str(caught.value)


def broken(folder, tiny_llama, change):
    shutil.copytree(tiny_llama, folder)
    change(folder)
    return folder


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4ec71fd53e99766de38f24\nsize 9976578928\n"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def as_gptq(folder):
    edit_config(quantization_config={"quant_method": "gptq"})(folder)
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.ones(8, 8, dtype=torch.int32)}, folder / "model.safetensors")


def damage_header(file):
    file.write_bytes(file.read_bytes()[:8] + b"{{" + file.read_bytes()[10:])


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "mistral": (edit_config(model_type="mistral"), "the architecture is 'mistral'"),
    "gptq": (lambda folder: as_gptq(folder), "quantised by gptq"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "contains no weights"),
    "cut off": (cut, "the file is cut off"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "bad config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "latin config": (
        lambda folder: (folder / "config.json").write_bytes(b'{\n"a": "\xe9"}'),
        "is not UTF-8: byte 0xe9\n",
    ),
    "list config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "marked config": (
        lambda folder: (folder / "config.json").write_bytes(b"\xef\xbb\xbf{}"),
        "not valid JSON: Unexpected UTF-8 BOM",
    ),
    "deep config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "is nested too deeply"),
    "a word": (edit_config(quantization_config="nf4"), "quantization_config is 'nf4', not an object"),
    "a list index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "a readable model.safetensors.index",
    ),
    "leftover": (
        edit_config(quantization_config=BNB),
        "the files contain plain F32 weights: quantization_config",
    ),
    "leftover gptq": (edit_config(quantization_config={"quant_method": "gptq"}), "are quantised (gptq), but the files"),
    "pad": (edit_config(pad_token_id=400), "pad_token_id is 400, but the model has embeddings for ids 0 to 399"),
    "pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "(10.0 GB) was not downloaded"),
    "pointer config": (lambda folder: (folder / "config.json").write_text(POINTER), "config.json is a git-lfs pointer"),
    "a page": (lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html>"), "not a safetensors file"),
    "a header": (lambda folder: damage_header(folder / "model.safetensors"), "the header of the safetensors file is"),
    "a shard": (
        lambda folder: lose_a_shard(folder),
        "is missing model-00002-of-00002.safetensors, which its index names",
    ),
    "meta": (lambda folder: (folder / "consolidated.00.pth").touch(), "convert_llama_weights_to_hf"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_a_base_is_refused_with_the_reason(tiny_llama, tmp_path, kind):
    change, message = BROKEN[kind]
    with pytest.raises(ModelError) as caught:
        find_checkpoint(str(broken(tmp_path / "model", tiny_llama, change)))
    print(caught.value)
    assert message in str(caught.value)


def test_an_adapter_beside_the_weights_is_neither_loaded_nor_cached(tiny_llama, tmp_path):
    """PEFT's adapter in the base's own folder, as trainers leave it: Transformers would load it with the weights."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_llama, folder)
    tuned = attach_adapter(base_of(tiny_llama, tmp_path / "other").model, LoraOptions())
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(folder)
    assert (folder / "adapter_config.json").exists()
    plain = loss_of(base_of(tiny_llama, tmp_path / "plain").model)
    for quantization in ("nf4", "nf4", "none"):
        base = base_of(folder, cache, quantization=quantization)
        assert not any("lora" in name for name, _ in base.model.named_parameters())
        if quantization == "nf4":
            assert loss_of(base.model) == plain
    (entry,) = (cache / "base").iterdir()
    assert {"config.json", "model.safetensors"} <= {file.name for file in entry.iterdir()}


def as_an_adapter_left_it(entry):
    """What 0.5.1 kept where an adapter lay in the base's folder."""
    for file in entry.iterdir():
        file.unlink()
    (entry / "adapter_config.json").write_text("{}")


def without_its_quantization(entry):
    config = json.loads((entry / "config.json").read_text())
    del config["quantization_config"]
    (entry / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        as_an_adapter_left_it,
        without_its_quantization,
        lambda entry: cut(entry),
        lambda entry: (entry / "model.safetensors").unlink(),
        lambda entry: (entry / "config.json").write_text("{"),
        lambda entry: lose_a_tensor(entry / "model.safetensors"),
    ],
    ids=["adapter", "plain config", "cut off", "no weights", "bad config", "a tensor lost"],
)
def test_a_damaged_copy_in_the_cache_is_replaced_with_a_notice(tiny_llama, tmp_path, change):
    before = loss_of(base_of(tiny_llama, tmp_path).model)
    (entry,) = (tmp_path / "base").iterdir()
    change(entry)
    again = base_of(tiny_llama, tmp_path)
    print(again.notices)
    assert not again.from_cache
    assert "the cached copy of the quantised base was damaged" in again.notices[0]
    assert loss_of(again.model) == before
    third = base_of(tiny_llama, tmp_path)
    assert (third.from_cache, third.notices) == (True, ())


def lose_a_tensor(file):
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_cannot_be_read_back_is_not_kept(tiny_llama, tmp_path, monkeypatch):
    """A disk that loses what was written: the run goes on, and the next one makes the copy anew."""
    save = LlamaForCausalLM.save_pretrained

    def lossy(model, folder, *words, **options):
        save(model, folder, *words, **options)
        lose_a_tensor(folder / "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
        base = base_of(tiny_llama, tmp_path)
    print(base.notices)
    assert base.notices == ("the quantised base is not cached: model.norm.weight was not saved",)
    assert not list((tmp_path / "base").iterdir())
    assert not base_of(tiny_llama, tmp_path).notices
    assert base_of(tiny_llama, tmp_path).from_cache


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_cached_copy_is_verified(tmp_path, quantization, tied):
    folder = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    first, second = (base_of(folder, tmp_path, torch.bfloat16, quantization=quantization) for _ in range(2))
    assert (first.notices, second.notices, second.from_cache) == ((), (), True)


UNBUILDABLE = {
    "heads": (
        {"num_attention_heads": 5},
        "The hidden size (64) is not a multiple of the number of attention heads (5)",
    ),
    "activation": ({"hidden_act": "swish-9"}, "cannot build: KeyError: 'swish-9'"),
    "rope": ({"rope_parameters": {"rope_type": "no-such"}}, "cannot build: KeyError: 'no-such'"),
    "type": ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
    "null": ({"intermediate_size": None}, "Field 'intermediate_size' expected int, got NoneType"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "dtype": ({"dtype": "int5"}, "cannot build: LlamaForCausalLM cannot be instantiated under `dtype=torch.int5`"),
    "vocabulary": (
        {"vocab_size": 405},
        "lm_head.weight is 400 x 64 in the file, but 405 x 64 according to config.json (and 1 more)",
    ),
    "key heads": (
        {"num_key_value_heads": 1},
        "k_proj.weight is 32 x 64 in the file, but 16 x 64 according to config.json (and 3 more)",
    ),
    "further layers": ({"num_hidden_layers": 3}, "there is no model.layers.2."),
}


@pytest.mark.parametrize("kind", UNBUILDABLE)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_that_transformers_cannot_build_is_explained(tiny_llama, tmp_path, kind, quantization):
    """In 4 bits Transformers takes weights of the wrong size, and it draws at random what the files lack."""
    changes, message = UNBUILDABLE[kind]
    folder = broken(tmp_path / "model", tiny_llama, edit_config(**changes))
    with pytest.raises(ModelError) as caught:
        base_of(folder, tmp_path / "cache", quantization=quantization)
    print(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "cache" / "base").exists()


def test_layers_that_the_configuration_leaves_out_are_refused(tiny_llama, tmp_path):
    folder = broken(tmp_path / "model", tiny_llama, edit_config(num_hidden_layers=1))
    with pytest.raises(ModelError) as caught:
        base_of(folder, tmp_path / "cache")
    print(caught.value)
    assert "the files contain model.layers.1.input_layernorm.weight" in caught.value.what
    assert "and 6 more, which the model of config.json does not have" in caught.value.what


def test_a_pointer_instead_of_a_tokenizer_model_is_named(tiny_llama, tmp_path):
    for name in ("tokenizer.model", "merges.txt"):
        folder = broken(tmp_path / name, tiny_llama, lambda folder: (folder / name).write_text(POINTER))  # noqa: B023
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=f"{re.escape(name)} is a git-lfs pointer"):
            load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_instead_of_the_tokenizer_is_named(tiny_llama, tmp_path, name):
    folder = broken(tmp_path / "model", tiny_llama, lambda folder: (folder / name).write_text(POINTER))
    for look in (load_tokenizer, lambda folder: find_checkpoint(str(folder))):
        with pytest.raises(ModelError) as caught:
            look(folder)
        print(caught.value)
        assert f"{name} is a git-lfs pointer: the file itself (10.0 GB)" in str(caught.value)
        assert "lfs pull" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "model in tokenizer.json is null"),
        ("tokenizer.json", "[]", "tokenizer.json is not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "chat_template in tokenizer_config.json is"),
    ],
)
def test_a_damaged_tokenizer_gives_a_message(tiny_llama, tmp_path, name, content, message):
    folder = broken(tmp_path / "model", tiny_llama, lambda folder: (folder / name).write_text(content))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    print(caught.value)
    assert message in caught.value.what


def test_a_leftover_quantization_on_bin_weights_is_named(tmp_path):
    folder = write_llama(tmp_path / "model", safe=False, dtype=torch.float16)
    edit_config(quantization_config=BNB)(folder)
    with pytest.raises(ModelError, match="the files contain plain float16 weights"):
        find_checkpoint(str(folder))


def test_an_adapter_with_a_config_json_is_not_a_base_either(tuned_run, tiny_llama, tmp_path):
    """As one whose run scaled RoPE is exported."""
    shutil.copytree(tuned_run.adapter, tmp_path / "adapter")
    shutil.copy(tiny_llama / "config.json", tmp_path / "adapter")
    with pytest.raises(ModelError, match="is a LoRA adapter, not a base model"):
        find_checkpoint(str(tmp_path / "adapter"))


def test_for_a_run_given_as_an_adapter_the_message_names_its_adapter(tuned_run):
    with pytest.raises(ModelError) as caught:
        read_adapter_config(tuned_run.folder)
    assert caught.value.fix == f"adapter={tuned_run.adapter}"


def test_a_pointer_in_a_run_that_was_cloned_is_named(tuned_run, tmp_path, cache):
    shutil.copytree(tuned_run.folder, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"tokenizer\.json is a git-lfs pointer"):
        load_answerer(open_run(tmp_path / "run"), cache)


def test_an_adapter_or_a_run_is_not_a_base_and_doctor_gives_the_same_message(tuned_run, tiny_llama):
    for folder, kind in ((tuned_run.adapter, "a LoRA adapter"), (tuned_run.folder, "a nybble run")):
        with pytest.raises(ModelError) as caught:
            find_checkpoint(str(folder))
        print(caught.value)
        assert caught.value.what == f"{folder} is {kind}, not a base model; its base is {tiny_llama}"
        assert caught.value.fix.endswith(f"nybble train {tiny_llama} DATA adapter={tuned_run.adapter}")
        with pytest.raises(ModelError, match="not a base model"):  # nybble data check DATA FOLDER
            load_tokenizer_and_config(load_recipe(None, [f"model.path={folder}"]))
        finding = base_model(str(folder))
        assert (finding.verdict, finding.detail, finding.fix) == ("fail", caught.value.what, caught.value.fix)


def test_a_tokenizer_whose_pad_token_has_no_embedding_pads_with_another(tmp_path, caplog):
    """A [PAD] that was added and never given a row: padding would be an index error, or a CUDA assert."""
    tokenizer = small_tokenizer()
    folder = write_llama(tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token_id == 0
    assert "has id 348, but the model has embeddings for ids 0 to 347" in caplog.text


def test_the_tokenizer_is_its_files_whichever_class_the_folder_declares_and_so_is_the_saved_one(
    llama2_like, tmp_path, caplog
):
    """Equal to sentencepiece with the real tokenizer.model on plain tokenisation too, as other programs do it."""
    piece = sentencepiece.SentencePieceProcessor(str(SHARED / "llama2-tokenizer" / "tokenizer.model"))
    tokenizer = load_tokenizer(llama2_like)
    declared = json.loads((llama2_like / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert ("as LlamaTokenizer gives different token ids" in caplog.text) == (declared == "LlamaTokenizer")
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("[INST] Hi [/INST] a  b\n  c", "  two spaces", "Hello world", "hé 😀 中文"):
            assert one(text).input_ids == [1, *piece.encode(text)]
        assert one("<s>[INST]", add_special_tokens=False).input_ids[:2] == [1, 518]


def test_a_bare_tokenizer_model_is_refused(llama2_like, tmp_path):
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(llama2_like / name, tmp_path)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    print(caught.value)
    assert "has tokenizer.model but no tokenizer.json" in str(caught.value)
    assert "tokenizer.json --local-dir" in str(caught.value)


def test_a_missing_model_and_a_missing_tokenizer_are_named(tmp_path):
    with pytest.raises(ModelError, match="not a Hub id"):
        find_checkpoint(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="no base model was given"):
        find_checkpoint("")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(write_llama(tmp_path / "bare"))


def test_the_fingerprint_follows_the_weights(tiny_llama, tmp_path):
    one, two = (broken(tmp_path / name, tiny_llama, lambda folder: None) for name in ("one", "two"))
    assert fingerprint(find_checkpoint(str(one)), tmp_path) == fingerprint(find_checkpoint(str(two)), tmp_path)
    content = bytearray((two / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (two / "model.safetensors").write_bytes(content)
    assert fingerprint(find_checkpoint(str(one)), tmp_path) != fingerprint(find_checkpoint(str(two)), tmp_path)


def test_wrong_targets_are_refused_with_the_names_that_exist(tiny_llama, cache):
    with pytest.raises(ModelError) as caught:
        attach_adapter(base_of(tiny_llama, cache).model, LoraOptions(targets=["query", "v_proj"]))
    print(caught.value)
    assert "no linear layer named query" in str(caught.value)
    assert "q_proj" in str(caught.value.fix)


def test_rows_longer_than_the_models_positions_need_rope_scaling(tiny_llama):
    checkpoint = find_checkpoint(str(tiny_llama))
    with pytest.raises(ModelError) as caught:
        check_length(load_config(checkpoint, None), 1000, None)
    print(caught.value)
    assert "above the model's 512 positions" in str(caught.value)
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = load_config(checkpoint, scaling)
    check_length(config, 1000, scaling)
    assert config.rope_parameters["factor"] == 2.0
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_a_missing_gpu_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(DeviceError, match="finds no CUDA device"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="float16 training on a CPU"):
        choose_dtype("float16", CPU)


@pytest.mark.parametrize("targets", [pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow), "all-linear"])
def test_an_evaluation_changes_neither_gradients_nor_a_merge(smollm2, cache, targets):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode on some processors; here it may not."""
    dtype, _ = choose_dtype("auto", CPU)
    model = attach_adapter(base_of(smollm2, cache, dtype).model, LoraOptions(targets=targets, init="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    before = gradients(model, dtype)
    weight = merged(model)
    model.eval()
    with torch.no_grad():
        loss_of(model, dtype)
        model.generate(input_ids=torch.arange(3, 19)[None], max_new_tokens=2, use_cache=True)
    model.train()
    after = gradients(model, dtype)
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    assert cosine > 0.999
    assert torch.equal(weight, merged(model))


def gradients(model, dtype):
    model.zero_grad()
    loss_of(model, dtype).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def merged(model):
    layer = model.base_model.model.model.layers[3].self_attn.q_proj
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state) + layer.get_delta_weight("default")


def test_dead_and_missing_gradients_stop_a_run(tiny_llama, cache):
    from nybble.errors import TrainingError

    model = attach_adapter(base_of(tiny_llama, cache).model, LoraOptions())
    with pytest.raises(TrainingError, match="got no gradient"):
        check_gradients(model, first=True)
    loss_of(model).backward()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    parameter.grad.zero_()
    with pytest.raises(TrainingError) as caught:
        check_gradients(model, first=True)
    print(caught.value)
    assert name in str(caught.value)


def test_a_saved_adapter_is_read_back(tiny_llama, cache, tmp_path):
    from nybble.errors import TrainingError

    model = attach_adapter(base_of(tiny_llama, cache).model, LoraOptions())
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(TrainingError, match="every B of the saved adapter is zero"):
        check_saved(model, tmp_path / "zero")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    with pytest.raises(TrainingError, match="differs from the trained one"):
        check_saved(model, tmp_path / "zero")
    model.save_pretrained(tmp_path / "good")
    check_saved(model, tmp_path / "good")
    other = load_adapter(base_of(tiny_llama, cache).model, tmp_path / "good")
    torch.testing.assert_close(loss_of(other), loss_of(model.eval()))
    with pytest.raises(ModelError, match="there is no adapter"):
        load_adapter(base_of(tiny_llama, cache).model, tmp_path)
    wider = write_llama(tmp_path / "wider", hidden_size=96)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(wider)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(base_of(wider, cache).model, tmp_path / "good")


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_dequantised_layers_answer_to_the_bit_as_4_bit_ones_do(tiny_llama, tmp_path, quantization):
    model = attach_adapter(base_of(tiny_llama, tmp_path, quantization=quantization).model, LoraOptions()).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 67).reshape(2, 32)

    def logits():
        with torch.inference_mode():
            tuned = model(input_ids=ids).logits
            with model.disable_adapter():
                return tuned, model(input_ids=ids).logits

    before = logits()
    assert not torch.equal(*before)
    assert dequantise_if_it_fits(model)
    assert not list(linear4bits(model))
    assert all(map(torch.equal, logits(), before))
    assert not dequantise_if_it_fits(model), "there is nothing left to do"


def test_4_bit_layers_that_compute_in_another_type_stay(tiny_llama, tmp_path):
    """As somebody's checkpoint may say."""
    base_of(tiny_llama, tmp_path / "cache").model.save_pretrained(tmp_path / "stored")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "stored")
    file = tmp_path / "stored" / "config.json"
    file.write_text(
        file.read_text().replace('"bnb_4bit_compute_dtype": "float32"', '"bnb_4bit_compute_dtype": "bfloat16"')
    )
    model = base_of(tmp_path / "stored", tmp_path / "cache").model.eval()
    assert {layer.compute_dtype for layer in linear4bits(model)} == {torch.bfloat16}
    assert not dequantise_if_it_fits(model)
    assert loss_of(model).isfinite()


def test_layers_of_a_gpu_s_model_whose_weights_are_on_the_host_stay(tiny_llama, tmp_path):
    model = base_of(tiny_llama, tmp_path).model
    model.model.norm.to("meta")
    assert not dequantise_if_it_fits(model)
    assert list(linear4bits(model))


def test_without_enough_memory_layers_stay_in_4_bits(tiny_llama, tmp_path, monkeypatch):
    model = base_of(tiny_llama, tmp_path).model
    monkeypatch.setattr("nybble.weights.on_cpu.host_memory", lambda: Memory(10_000, 20_000))
    assert not dequantise_if_it_fits(model)
    assert list(linear4bits(model))


def test_models_stay_in_4_bits_unless_dequantising_is_requested(tuned_run, cache):
    assert list(linear4bits(load_answerer(tuned_run, cache).model))
    assert not list(linear4bits(load_answerer(tuned_run, cache, dequantise=True).model))


def with_added_tokens(folder, out, **options):
    """An adapter that somebody trained on this base with five more tokens."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(405)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **options)).save_pretrained(out)
    return out


MORE = "embed_tokens.weight is 405 x 64 in the adapter, but 400 x 64 in the base (and 1 more)"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, MORE),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, MORE),
        (
            {"trainable_token_indices": [3, 402]},
            "trained on token 402, but the base has embeddings for ids 0 to 399 only",
        ),
        ({"trainable_token_indices": {"embed_tokens": [404]}}, "trained on token 404"),
    ],
)
def test_an_adapter_with_added_tokens_is_explained_with_the_sizes(tiny_llama, cache, tmp_path, options, message):
    adapter = with_added_tokens(tiny_llama, tmp_path / "adapter", **options)
    fitting = attach_adapter(base_of(tiny_llama, cache).model, LoraOptions())
    for load in (
        lambda: load_adapter(base_of(tiny_llama, cache).model, adapter),
        lambda: resume_adapter(base_of(tiny_llama, cache).model, str(adapter)),
        lambda: add_adapter(fitting, adapter, "other"),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        print(caught.value)
        assert message in caught.value.what
        assert "resize_token_embeddings" in caught.value.fix


def test_an_adapter_of_another_width_shows_both_sizes(tiny_llama, cache, tmp_path):
    attach_adapter(base_of(tiny_llama, cache).model, LoraOptions(r=8)).save_pretrained(tmp_path / "adapter")
    wider = write_llama(tmp_path / "wider", hidden_size=96)
    with pytest.raises(ModelError) as caught:
        load_adapter(base_of(wider, cache).model, tmp_path / "adapter")
    print(caught.value)
    assert "lora_A.weight is 8 x 64 in the adapter, but 8 x 96 in the base (and " in caught.value.what
    assert "it was trained on" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", POINTER, "adapter_model.safetensors is a git-lfs pointer"),
        ("adapter_config.json", POINTER, "adapter_config.json is a git-lfs pointer"),
        ("adapter_config.json", "{", "adapter_config.json is not valid JSON"),
        ("adapter_model.safetensors", "{", "the file is cut off"),
    ],
)
def test_a_damaged_adapter_gives_a_message(tiny_llama, cache, tmp_path, name, content, message):
    attach_adapter(base_of(tiny_llama, cache).model, LoraOptions(r=8)).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as caught:
        load_adapter(base_of(tiny_llama, cache).model, tmp_path)
    print(caught.value)
    assert message in caught.value.what


def test_an_adapter_that_names_its_base_wrongly_opens_on_one_that_is_given(tiny_llama, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": 3}')
    with pytest.raises(ModelError, match="base_model_name_or_path is not text") as caught:
        open_run(tmp_path)
    assert caught.value.fix == "--base FOLDER names the base"
    assert open_run(tmp_path, str(tiny_llama)).recipe.model.path == str(tiny_llama)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER.encode(), "adapter_config.json is a git-lfs pointer"),
        (b"{", "adapter_config.json is not valid JSON"),
        (b'{"a": "\xe9"}', "adapter_config.json is not UTF-8: byte 0xe9"),
        (b"[]", "adapter_config.json is not a JSON object"),
        (b'{"base_model_name_or_path": 3}', "base_model_name_or_path is not text"),
    ],
)
def test_an_adapter_whose_configuration_is_damaged_is_named_wherever_it_is_opened(tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_bytes(content)
    for opens in (
        open_run,
        lambda folder: find_checkpoint(str(folder)),
        lambda folder: find_checkpoint(str(folder), weights=False),
    ):
        with pytest.raises(ModelError) as caught:
            opens(tmp_path)
        print(caught.value)
        assert message in caught.value.what
        assert str(tmp_path / "adapter_config.json") in caught.value.where
        assert caught.value.fix
