"""Fused models that somebody changes afterwards: what a batch meets is what the modules say then."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.errors import EngineError
from nybble.training.module_walks import without_module_walks
from tests.conftest import write_llama
from tests.engine.test_engine import DEVICE, assert_same, batch_of, gradients, load


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers, grouped heads."""
    return write_llama(tmp_path_factory.mktemp("changes") / "llama", num_hidden_layers=3, rms_norm_eps=1e-5)


def base_of(folder, **words):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=DEVICE, **words)
    model.config.use_cache = False
    return model


def unfused(model, batch=None):
    """What a copy without the engine says."""
    return gradients(unfuse(copy.deepcopy(model)), batch or batch_of())


def test_an_adapter_may_come_after_fuse(llama):
    base = fuse(base_of(llama).requires_grad_(False))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    assert_same(gradients(model, batch_of()), unfused(model))
    assert len(gradients(model, batch_of())[1]) == 42
    assert fusion(model).fallen_back == 0


def test_a_wider_adapter_may_come_later_and_all_may_go(llama):
    model = fuse(load(llama, "none", target_modules=["q_proj", "v_proj"]))
    gradients(model, batch_of())
    model.add_adapter("wide", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("wide")
    assert_same(gradients(model, batch_of()), unfused(model), 1e-3)
    assert fusion(model).fallen_back == 0
    base = model.unload()
    assert base(**batch_of()).loss.item() == pytest.approx(base_of(llama)(**batch_of()).loss.item(), rel=1e-6)


def test_a_merged_model_may_be_adapted_again(llama):
    merged = fuse(load(llama, "none")).merge_and_unload()
    model = get_peft_model(merged, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).train()
    assert_same(gradients(model, batch_of()), unfused(model))
    assert fusion(model).fallen_back == 0


@pytest.mark.parametrize("what", ["input_layernorm.weight", "q_proj.base_layer.weight"])
def test_parameters_unfrozen_later_get_gradients(llama, what, caplog):
    model = fuse(load(llama, "none"))
    gradients(model, batch_of())
    for name, parameter in model.named_parameters():
        if name.endswith(what):
            parameter.requires_grad_(True)
    found = gradients(model, batch_of())
    assert sum(name.endswith(what) for name in found[1]) == 3
    assert_same(found, unfused(model))
    assert fusion(model).fallen_back == 3
    assert "trained" in caplog.text


def test_weights_may_be_replaced(llama):
    model = fuse(load(llama, "none"))
    gradients(model, batch_of())
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert_same(gradients(model, batch_of()), unfused(model), 1e-3)
    assert fusion(model).fallen_back == 0


def test_dropout_may_be_switched_off_and_masks_differ_in_evaluation_mode_too(llama):
    model = fuse(load(llama, "none", lora_dropout=0.3))
    model.get_base_model().model.training = False  # what from_pretrained gives, below a PeftModel in training mode
    losses = {gradients(model, batch_of())[0] for _ in range(3)}
    assert len(losses) == 3
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert gradients(model, batch_of())[0] == gradients(model, batch_of())[0]
    assert_same(gradients(model, batch_of()), unfused(model))


def test_hooks_inside_a_layer_are_called(llama):
    model = fuse(load(llama, "none"))
    called = []
    layer = model.get_base_model().model.layers[1]
    handle = layer.self_attn.register_forward_hook(lambda *words: called.append(1))
    gradients(model, batch_of())
    assert called == [1]
    assert "1 not fused: self_attn has other hooks" in fusion(model).describe()
    handle.remove()
    gradients(model, batch_of())
    assert fusion(model).fallen_back == 0
    layer.mlp.down_proj.lora_A["default"].register_forward_pre_hook(lambda *words: called.append(2))
    gradients(model, batch_of())
    assert called == [1, 2]


def test_a_hook_may_change_a_layer_s_output_in_place(llama):
    model = load(llama, "none")

    def steer(module, words, out):
        out[:, 0] += 1
        return out

    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(steer)
    expected = gradients(model, batch_of())
    fuse(model)
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model).fallen_back == 0


def test_sixteen_bits_by_autocast_deviate_no_more_than_without_fusing(llama):
    model = load(llama, "none")
    for name, parameter in model.named_parameters():
        if "q_proj.base" in name or "k_proj.base" in name:
            parameter.data *= 6  # sharp attention: a softmax in 16 bits would be far off
    batch = batch_of(4, 61)
    _, exact = gradients(model, batch)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, plain = gradients(model, batch)
        _, ours = gradients(fuse(model), batch)
    strays = [sum(((part[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact) for part in (ours, plain)]
    assert strays[0] < 1.1 * strays[1]
    gradients(model, batch)
    assert set(fusion(model).choices) == {torch.bfloat16, torch.float32}


def test_inference_mode_before_training(llama):
    model = fuse(load(llama))
    with torch.inference_mode():
        model(**batch_of())
    assert_same(gradients(model, batch_of()), unfused(model))
    assert fusion(model).fallen_back == 0


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_any_type(llama, storage):
    words = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=storage, bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = get_peft_model(
        base_of(llama, quantization_config=words), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    fuse(model.train())
    assert_same(gradients(model, batch_of()), unfused(model))
    assert fusion(model).fallen_back == 0


def test_generation_between_steps_repacks_nothing(llama):
    """On processors with AVX512-BF16 bitsandbytes would repack 4-bit weights for inference, and backward misread them."""
    words = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = get_peft_model(
        base_of(llama, quantization_config=words), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    fuse(model.train())
    before = gradients(model, batch_of())
    model.eval().generate(input_ids=batch_of(1, 9)["input_ids"], max_new_tokens=3, use_cache=True, pad_token_id=0)
    assert fusion(model).describe().startswith("3 of 3"), "a report is of the last batch that was trained on"
    assert_same(gradients(model.train(), batch_of()), before)
    assert fusion(model).fallen_back == 0


def test_evaluation_keeps_nothing(llama):
    model = fuse(load(llama, "none"))
    with torch.no_grad():
        model(**batch_of())
    assert fusion(model).fused == 3
    assert not fusion(model).last.policies


def test_a_model_for_classes_is_fused_too(llama):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.float32).to(DEVICE)
    base.config.pad_token_id, base.config.use_cache = 0, False
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, lora).train()
    batch = {"input_ids": batch_of()["input_ids"], "labels": torch.tensor([0, 2], device=DEVICE)}
    expected = gradients(model, batch)
    fuse(model)
    assert_same(gradients(model, batch), expected)
    assert fusion(model).fallen_back == 0


def test_a_failed_fuse_leaves_the_model_as_it_was(tmp_path):
    model = load(write_llama(tmp_path / "llama", tie_word_embeddings=True), "none")
    expected = gradients(model, batch_of())
    with pytest.raises(EngineError):
        fuse(model, embedding="host")
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model) is None
    fuse(model)
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model).fallen_back == 0


def test_a_pickled_model_says_that_it_is_no_longer_fused(llama, tmp_path):
    model = fuse(load(llama, "none"))
    expected = gradients(model, batch_of())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(gradients(again, batch_of()), expected)
    assert "fuse again" in fusion(again).describe()
    assert_same(gradients(fuse(again), batch_of()), expected)
    assert fusion(again).fallen_back == 0


def test_layers_may_be_cut_off(llama):
    model = fuse(load(llama, "none"))
    gradients(model, batch_of())
    backbone = model.get_base_model().model
    del backbone.layers[2]
    backbone.config.num_hidden_layers = 2
    assert_same(gradients(model, batch_of()), unfused(model))
    assert fusion(model).describe().startswith("2 of 2")


def test_checkpointing_switched_off_again_stays_off(llama):
    model = fuse(load(llama, "none"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients(model, batch_of())
    model.gradient_checkpointing_disable()
    unfuse(model)
    assert not any(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


def test_a_sharded_kind_of_weight_is_named(llama):
    class Shard(torch.nn.Parameter):
        pass

    model = load(llama, "none")
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base.weight = Shard(base.weight.data, requires_grad=False)
    fuse(model)
    print(fusion(model).describe())
    assert "1 not fused: q_proj's weight is a " in fusion(model).describe()
    base.weight = torch.nn.Parameter(base.weight.data[:3], requires_grad=False)
    assert "q_proj's weight of shape (3, 64) is only a part of it" in fusion(fuse(model)).describe()


def test_data_parallel_and_two_backbones_are_refused(llama):
    model = fuse(load(llama, "none"))
    model.get_base_model().model._is_replica = True  # as torch.nn.DataParallel marks its copies
    with pytest.raises(EngineError) as caught:
        model(**batch_of())
    print(caught.value)
    assert "torch.nn.DataParallel copies the layers" in str(caught.value)
    with pytest.raises(EngineError) as caught:
        fuse(torch.nn.ModuleList([load(llama, "none"), load(llama, "none")]))
    print(caught.value)
    assert "there are 2 Llama backbones in ModuleList" in str(caught.value)


def test_the_optimiser_s_state_is_counted_until_it_exists(llama):
    """Micro batches in the middle of a step see gradients, the first of the next step does not."""
    model = fuse(load(llama, "none"))
    budget, coming = fusion(model).budget, []
    original = budget.loss_bytes
    budget.loss_bytes = lambda tokens: coming.append(budget._stepped) or original(tokens)
    for _ in range(3):
        for _ in range(2):
            model(**batch_of()).loss.backward()
        model.zero_grad()
    assert coming == [False, False, True, True, True, True]


def test_steps_without_walks_leave_copies_and_parts_alone(llama):
    model = load(llama, "none")
    with without_module_walks(model):
        copy.deepcopy(model).eval()
        assert all(module.training for module in model.modules())
        model.get_base_model().model.layers[1].eval()
        assert all(module.training for module in model.train().modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        gradients(model, batch_of())
        model.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not {"train", "zero_grad", "nybble_modules"} & model.__dict__.keys()


def test_unchanged_layers_are_checked_without_bitsandbytes_cost_per_access(llama, monkeypatch):
    model = fuse(load(llama))
    gradients(model, batch_of())
    layers, seen = list(model.get_base_model().model.layers), []
    kind = type(layers[0].mlp.up_proj.base_layer.weight)
    noted = classmethod(lambda cls, function, *args, **kwargs: seen.append(function))
    monkeypatch.setattr(kind, "__torch_function__", noted)
    found, _ = fusion(model).read(layers)
    assert len(found) == 3
    assert not seen
    layers[0].mlp.up_proj.base_layer.weight.data_ptr()
    assert len(seen) == 1, "the class is asked in another way"


def test_loading_an_adapter_twice_finds_it_each_time(llama, tmp_path):
    model = fuse(load(llama, "none"))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fuse(base_of(llama)), tmp_path / "adapter", is_trainable=True).train()
    assert_same(gradients(again, batch_of()), gradients(model, batch_of()))
    assert fusion(again).fallen_back == 0


def test_a_weight_that_lost_its_state_keeps_its_layer_plain_and_the_others_fused(llama):
    model = load(llama)
    projection = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    projection.weight = torch.nn.Parameter(projection.weight.data.as_subclass(torch.Tensor), requires_grad=False)
    fuse(model)
    report = fusion(model).describe()
    assert fusion(model).last.fused == len(model.get_base_model().model.layers) - 1, report
    assert "not quantised yet" in report


def test_an_incompatible_library_leaves_nothing_of_the_engine_behind(llama, monkeypatch):
    model = load(llama)
    monkeypatch.setattr("nybble.weights.structure.LORA_ATTRIBUTES", ("_moved_elsewhere",))
    with pytest.raises(EngineError, match="has no _moved_elsewhere"):
        fuse(model)
    assert fusion(model) is None
    assert not any("forward" in layer.__dict__ for layer in model.get_base_model().model.layers)
