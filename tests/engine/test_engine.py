"""The fused layers against Transformers' and PEFT's own, on a CPU by the reference or on the GPU by the kernels."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.loss import summed_cross_entropy
from nybble.engine.memory import Share
from nybble.engine.product import copy_rows
from nybble.errors import EngineError
from nybble.plan.ledger import kept_bytes
from nybble.plan.policies import LADDER, LOSS_CHUNK
from nybble.plan.shapes import LayerShape
from nybble.plan.solver import mix
from nybble.weights.on_cpu import stay_unpacked
from tests.conftest import write_llama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = list(reversed(LADDER))


def load(folder, quant="nf4", dtype=torch.float32, device=DEVICE, **lora):
    """A base with random adapters whose B is not zero."""
    storage = None
    if quant != "none":
        storage = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else device
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=storage, device_map={"": place}
    )
    base.config.use_cache = False
    base.requires_grad_(False)
    stay_unpacked(base)
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return model.train()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers, grouped heads."""
    return write_llama(tmp_path_factory.mktemp("engine") / "llama", num_hidden_layers=3, rms_norm_eps=1e-5)


def batch_of(rows=2, length=37, seed=0):
    ids = torch.randint(0, 400, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model, batch, **keywords):
    """Loss and every adapter's gradient in float32."""
    model.zero_grad()
    loss = model(**batch, **keywords).loss
    loss.backward()
    return loss.item(), {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def cosine(ours, theirs):
    """The worst over all tensors."""
    assert ours.keys() == theirs.keys()
    return min(torch.cosine_similarity(ours[n].flatten(), theirs[n].flatten(), dim=0).item() for n in theirs)


def assert_same(ours, theirs, tolerance=1e-4):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        difference = (ours[1][name] - expected).norm() / expected.norm()
        assert difference < tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
def test_every_gradient_is_the_plain_path_s_under_every_policy(llama, quant, policy):
    model = load(llama, quant)
    expected = gradients(model, batch_of())
    fuse(model, policy)
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model).fallen_back == 0
    unfuse(model)
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model) is None


SHAPES = {
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64, "head_dim": 64},
    "SmolLM2's": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "head_dim": 64},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128, "head_dim": 256},
    "96": {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 192, "head_dim": 96},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_heads(tmp_path, shape):
    model = load(write_llama(tmp_path / "llama", intermediate_size=192, **SHAPES[shape]))
    expected = gradients(model, batch_of())
    fuse(model, "drop-qkv")
    assert_same(gradients(model, batch_of()), expected)


ADAPTERS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "MLP only": {"target_modules": ["gate_proj", "down_proj"]},
    "o only": {"target_modules": ["o_proj"]},
    "rsLoRA": {"use_rslora": True, "r": 16},
    "odd ranks": {"r": 5, "rank_pattern": {"v_proj": 3, "up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_kinds_of_adapters(llama, kind):
    model = load(llama, **ADAPTERS[kind])
    expected = gradients(model, batch_of())
    for policy in ("keep-all", "layer-input"):
        fuse(model, policy)
        assert_same(gradients(model, batch_of()), expected)
        assert fusion(model).fallen_back == 0


@pytest.mark.parametrize("policy", ["keep-all", "drop-qkv", "host"])
def test_tiles_change_nothing(llama, policy, monkeypatch):
    model = load(llama)
    expected = gradients(model, batch_of(3, 41))
    monkeypatch.setattr("nybble.plan.policies.WIDE_TILE", 50)
    monkeypatch.setattr("nybble.plan.policies.NARROW_TILE", 17)
    fuse(model, policy)
    assert_same(gradients(model, batch_of(3, 41)), expected)


def test_policies_may_differ_from_layer_to_layer(llama, monkeypatch):
    model = load(llama)
    expected = gradients(model, batch_of())
    fuse(model, "auto")
    mixed = ("layer-input", "drop-mlp", "keep-all")
    monkeypatch.setattr(fusion(model).budget, "share", lambda *words: Share(mixed, 0))
    assert_same(gradients(model, batch_of()), expected)
    assert "1 x layer-input, 1 x drop-mlp, 1 x keep-all" in fusion(model).describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["keep-all", "layer-input"])
def test_gradients_in_sixteen_bits_point_in_the_direction_of_float32(tmp_path, dtype, policy):
    """The bound of the plan: cosine above 0.9995 for every adapter of a layer, its input and its output's gradient given."""
    if dtype == torch.float16 and DEVICE == "cpu":
        pytest.skip("float16 is for GPUs")
    sizes = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512}
    folder = write_llama(tmp_path / "wide", **sizes)
    models = [load(folder, "none", dtype), load(folder, "none")]  # 4 bits quantised from 16 and from 32 would differ
    for ours, theirs in zip(*[model.parameters() for model in models], strict=True):
        if not theirs.requires_grad and theirs.is_floating_point():
            theirs.data.copy_(ours.data)
    fuse(models[0], policy)
    generator = torch.Generator().manual_seed(3)
    x, change = (torch.randn(2, 123, 256, generator=generator).to(DEVICE, dtype) for _ in range(2))
    found = []
    for model, kind in zip(models, (dtype, torch.float32), strict=True):
        states = model.get_base_model().model(inputs_embeds=x.to(kind)).last_hidden_state
        states.backward(change.to(kind))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert fusion(models[0]).fallen_back == 0
    assert len(found[0]) == 14
    assert cosine(*found) > 0.9995


def test_sixteen_bits_deviate_no_more_than_without_fusing(llama):
    model, exact = load(llama, "none", torch.bfloat16), load(llama, "none")
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if not theirs.requires_grad and theirs.is_floating_point():
            theirs.data.copy_(ours.data)
    _, expected = gradients(exact, batch_of(4, 61))
    _, plain = gradients(model, batch_of(4, 61))
    fuse(model)
    _, ours = gradients(model, batch_of(4, 61))
    strays = [
        sum(1 - torch.cosine_similarity(part[n].flatten(), expected[n].flatten(), dim=0).item() for n in expected)
        for part in (ours, plain)
    ]
    assert strays[0] < strays[1]


def test_packed_rows_do_not_see_each_other(llama):
    model = load(llama)
    batch = batch_of(2, 30)
    positions = torch.cat([torch.arange(11), torch.arange(19)]).repeat(2, 1).to(DEVICE)
    expected = gradients(model, batch, position_ids=positions)
    fuse(model)
    assert_same(gradients(model, batch, position_ids=positions), expected)
    bounds = torch.tensor([0, 11, 30, 41, 60], dtype=torch.int32, device=DEVICE)
    words = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 19, "max_length_k": 19}
    assert_same(gradients(model, batch, position_ids=positions, **words), expected)
    assert fusion(model).fallen_back == 0


def test_padding_on_either_side_is_fused(llama):
    model = load(llama)
    for side in ("right", "left"):
        batch = batch_of(2, 20)
        mask = torch.ones_like(batch["input_ids"])
        pad = slice(14, 20) if side == "right" else slice(0, 6)
        mask[1, pad] = 0
        batch["labels"][1, pad] = -100
        unfuse(model)
        expected = gradients(model, batch, attention_mask=mask)
        fuse(model)
        assert_same(gradients(model, batch, attention_mask=mask), expected)
        assert fusion(model).fallen_back == 0


def test_every_call_follows_peft_s_state(llama, tmp_path):
    model = load(llama)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    batch = batch_of()

    def answers():
        logits = {}
        with torch.no_grad():
            for mode in (True, False):
                model.train(mode)
                logits["first", mode] = model(**batch).logits
                with model.disable_adapter():
                    logits["base", mode] = model(**batch).logits
                model.set_adapter("other")
                logits["other", mode] = model(**batch).logits
                model.set_adapter("default")
        return logits

    expected = answers()
    fuse(model)
    ours = answers()
    for case, logits in expected.items():
        torch.testing.assert_close(ours[case], logits, rtol=1e-4, atol=1e-4)
    assert (expected["first", True] - expected["base", True]).abs().max() > 1e-2
    assert (expected["other", True] - expected["base", True]).abs().max() > 1e-2


def test_merged_adapters_are_in_the_base(llama):
    model = load(llama, "none")
    fuse(model)
    before = model(**batch_of()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch_of()).logits, before, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():  # PEFT unmerges in the layers' own forward
        base = model(**batch_of()).logits
    assert fusion(model).fallen_back == 3
    assert (base - before).abs().max() > 1e-2
    torch.testing.assert_close(model(**batch_of()).logits, before, rtol=1e-3, atol=1e-3)


def test_state_saving_and_loading_stay_peft_s(llama, tmp_path):
    model = load(llama)
    names = [name for name, _ in model.named_parameters()], list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == names
    model.save_pretrained(tmp_path / "fused")
    file = "adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "adapter_config.json").read_text())["r"] == 4
    assert again is not None


def test_a_copy_of_a_fused_model_is_its_own(llama):
    model = fuse(load(llama, "none"))
    other = copy.deepcopy(model)
    expected = gradients(model, batch_of())
    assert_same(gradients(other, batch_of()), expected)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert_same(gradients(model, batch_of()), expected)


def test_dropout_is_regenerated_and_its_gradient_is_right(llama):
    model = load(llama, "none", lora_dropout=0.3)
    batch = batch_of()

    def run(policy):
        fuse(model, policy)
        torch.manual_seed(7)
        return gradients(model, batch)

    kept = run("keep-all")
    for policy in POLICIES[1:]:
        assert_same(run(policy), kept, 1e-5)
    torch.manual_seed(8)
    assert gradients(model, batch)[0] != kept[0], "another seed, another mask"
    model.eval()
    plain = gradients(model, batch)[0]
    unfuse(model)
    assert plain == pytest.approx(gradients(model, batch)[0], rel=1e-5), "no dropout in eval"
    model.train()
    # The loss along the gradient, by finite differences with the same masks.
    fuse(model, "layer-input")
    direction = {n: g / g.norm() for n, g in kept[1].items()}
    losses = []
    for step in (1e-2, -1e-2):
        for name, parameter in model.named_parameters():
            if name in direction:
                parameter.data += step * direction[name]
        torch.manual_seed(7)
        losses.append(gradients(model, batch)[0])
        for name, parameter in model.named_parameters():
            if name in direction:
                parameter.data -= step * direction[name]
    slope = sum((kept[1][n] * direction[n]).sum().item() for n in direction)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=2e-2)


def test_micro_batches_add_up(llama):
    model = fuse(load(llama))
    whole = gradients(model, batch_of(4, 21))[1]
    model.zero_grad()
    batch = batch_of(4, 21)
    for rows in (slice(0, 2), slice(2, 4)):
        (model(**{name: part[rows] for name, part in batch.items()}).loss / 2).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, expected in whole.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5)


def test_two_forwards_before_their_backwards(llama):
    for policy in ("keep-all", "host"):
        model = fuse(load(llama), policy)
        first, second = gradients(model, batch_of())[1], gradients(model, batch_of(seed=3))[1]
        model.zero_grad()
        losses = [model(**batch_of()).loss, model(**batch_of(seed=3)).loss]
        sum(losses).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, first[name] + second[name], rtol=1e-3, atol=1e-5)


def test_generation_uses_the_original_forward(llama):
    model = load(llama).eval()
    ids = batch_of(1, 9)["input_ids"]
    words = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **words)
    fuse(model)
    assert torch.equal(model.generate(input_ids=ids, **words), expected)


FALLBACKS = {
    "DoRA": ({"use_dora": True}, "q_proj has the LoRA variant Dora"),
    "bias": ({"lora_bias": True}, "q_proj's adapter has a bias"),
    "norms": ({"modules_to_save": ["input_layernorm"]}, "where LlamaRMSNorm was expected"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("kind", FALLBACKS)
def test_an_unsupported_layer_keeps_its_original_forward_and_is_named(llama, kind, caplog):
    words, reason = FALLBACKS[kind]
    model = load(llama, "none", **words)
    expected = gradients(model, batch_of())
    fuse(model)
    assert_same(gradients(model, batch_of()), expected)
    print(fusion(model).describe())
    assert fusion(model).fallen_back == 3
    assert reason in fusion(model).describe()
    assert reason in caplog.text


def test_several_active_adapters_fall_back(llama, caplog):
    model = load(llama, "none")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = gradients(model, batch_of())
    fuse(model)
    assert_same(gradients(model, batch_of()), expected)
    assert "q_proj has 2 active adapters" in caplog.text


def test_one_odd_layer_falls_back_alone(llama):
    model = load(llama, "none")
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.o_proj.base_layer.bias = torch.nn.Parameter(torch.ones(64, device=DEVICE), requires_grad=False)
    expected = gradients(model, batch_of())
    fuse(model)
    assert_same(gradients(model, batch_of()), expected)
    assert fusion(model).describe().startswith("2 of 3 decoder layers fused")
    assert "1 not fused: o_proj has a bias" in fusion(model).describe()
    positions = torch.cat([torch.arange(20), torch.arange(17)]).repeat(2, 1).to(DEVICE)
    ours = gradients(model, batch_of(), position_ids=positions)
    unfuse(model)
    assert_same(ours, gradients(model, batch_of(), position_ids=positions))


def test_gradient_checkpointing_is_taken_over_and_given_back(llama, caplog):
    model = load(llama)
    expected = gradients(model, batch_of())
    fuse(model, "drop-mlp")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, batch_of()), expected)
    layers = model.get_base_model().model.layers
    assert not any(layer.gradient_checkpointing for layer in layers)
    assert "gradient checkpointing was on; the fused layers follow policy='drop-mlp' instead" in caplog.text
    unfuse(model)
    assert all(layer.gradient_checkpointing for layer in layers)


def test_layers_spread_over_devices_are_refused(llama):
    model = load(llama, "none")
    add_hook_to_module(model.get_base_model().model.layers[2].mlp, ModelHook())
    with pytest.raises(EngineError) as caught:
        fuse(model)
    print(caught.value)
    assert "layers.2.mlp has Accelerate's hooks (ModelHook)" in str(caught.value)
    assert 'device_map={"": 0}' in str(caught.value)


def test_other_architectures_and_policies_are_refused():
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    with pytest.raises(EngineError) as caught:
        fuse(MistralForCausalLM(config))
    print(caught.value)
    assert "there is no Llama backbone in MistralForCausalLM" in str(caught.value)
    with pytest.raises(EngineError) as caught:
        fuse(MistralForCausalLM(config), "keep-most")
    print(caught.value)
    assert "there is no policy 'keep-most'" in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_may_stay_on_the_host(tmp_path, tied):
    model = load(write_llama(tmp_path / "llama", tie_word_embeddings=tied))
    expected = gradients(model, batch_of())
    if tied:
        with pytest.raises(EngineError) as caught:
            fuse(model, embedding="host")
        print(caught.value)
        assert "the embedding is also the head" in str(caught.value)
        return
    names = list(model.state_dict())
    fuse(model, embedding="host")
    model.to(DEVICE)  # as Accelerate does
    embedding = model.get_input_embeddings()
    assert embedding.weight.device.type == "cpu"
    assert model.device.type == DEVICE, "Transformers takes the first parameter's device for the model's"
    assert next(model.parameters()) is model.get_base_model().model.norm.weight
    assert sorted(model.state_dict()) == sorted(names)
    assert_same(gradients(model, batch_of()), expected)
    unfuse(model)
    assert list(model.state_dict()) == names
    assert embedding.weight.device.type == DEVICE
    assert_same(gradients(model, batch_of()), expected)


class Copies(TorchDispatchMode):
    """The types that torch copied from and to."""

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, operation, types, words=(), keywords=None):
        if operation is torch.ops.aten.copy_.default:
            self.met.append((words[1].dtype, words[0].dtype))
        return operation(*words, **(keywords or {}))


WHOLE = (torch.complex128, torch.complex128)
SIXTEENS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("dtype", SIXTEENS)
@pytest.mark.parametrize(
    "columns, room, start", [(64, 8, 0), (64, 0, 0), (8, 16, 8), (0, 8, 0), (63, 9, 0), (64, 7, 0), (64, 8, 1)]
)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_are_copied_to_the_bit_and_by_sixteen_bytes_where_they_allow_it(dtype, columns, room, start, rows):
    """Any bits: numbers that are none are copied with what they say."""
    bits, generator = SIXTEENS[dtype], torch.Generator().manual_seed(0)
    limits = torch.iinfo(bits)
    drawn = [
        torch.randint(limits.min, limits.max, (rows, columns + room), dtype=bits, generator=generator).to(DEVICE)
        for _ in range(2)
    ]
    place = slice(start, columns + start)
    expected = drawn[1].clone()
    expected[:, :columns] = drawn[0][:, place]
    source, target = (each.view(dtype) for each in drawn)
    with torch.no_grad(), Copies() as copies:
        copy_rows(source[:, place], target[:, :columns])
    assert torch.equal(target.view(bits), expected)
    whole = not any(number * dtype.itemsize % 16 for number in (columns, room, start))
    assert copies.met == [WHOLE if whole else (dtype, dtype)]


def test_rows_of_another_type_or_alignment_are_copied_too():
    numbers = torch.randn(5, 64, device=DEVICE)
    target = torch.zeros(5, 72, dtype=torch.bfloat16, device=DEVICE)
    copy_rows(numbers, target[:, :64])
    assert torch.equal(target[:, :64], numbers.to(torch.bfloat16))
    turned = torch.zeros(64, 5, device=DEVICE).t()
    copy_rows(numbers, turned)
    assert torch.equal(turned, numbers)
    somewhere = torch.frombuffer(bytearray(5 * 64 * 4 + 32), dtype=torch.uint8)
    odd = (
        somewhere[(4 - somewhere.data_ptr()) % 16 :][: 5 * 64 * 4].numpy().data
    )  # a buffer that begins 4 bytes too late
    late = torch.frombuffer(odd, dtype=torch.float32).view(5, 64)
    assert (late.data_ptr() % 16, late.storage_offset()) == (4, 0)
    copy_rows(numbers.cpu(), late)
    assert torch.equal(late, numbers.cpu())


def test_a_fused_layer_copies_by_sixteen_bytes(llama):
    model = fuse(load(llama, "none"), policy="keep-all")
    with Copies() as copies:
        gradients(model, batch_of())
    assert copies.met.count(WHOLE) == 2 * 3


@pytest.mark.parametrize("rows", [5, LOSS_CHUNK + 7])
@pytest.mark.parametrize("skip", [False, True])
def test_loss_in_chunks(rows, skip):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 32, device=DEVICE, requires_grad=True)
    head, targets = torch.randn(101, 32, device=DEVICE), torch.randint(0, 101, (rows,), device=DEVICE)
    targets[::3] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, ignore_index=-100, reduction="sum")
    (wanted,) = torch.autograd.grad(expected / 7, hidden)
    places = (targets >= 0).nonzero().flatten() if skip else None
    ours = summed_cross_entropy(hidden, head, targets, places)
    torch.testing.assert_close(ours, expected.detach().float(), rtol=1e-5, atol=1e-3)
    (gradient,) = torch.autograd.grad(ours / 7, hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, head, targets, places), ours.detach())


class Rows(TorchDispatchMode):
    """The numbers of rows that were multiplied, from both sides."""

    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, operation, types, words=(), keywords=None):
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.met.add(len(words[0]))
        return operation(*words, **(keywords or {}))


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, LOSS_CHUNK - 1, LOSS_CHUNK, LOSS_CHUNK + 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [False, True])
def test_products_of_the_loss_have_few_different_numbers_of_rows(rows, dtype, skip, monkeypatch):
    """The residual stream is float32 in both cases: gradients go into place and by way of another type."""
    torch.manual_seed(0)
    hidden = torch.randn(rows + 50, 32, device=DEVICE, requires_grad=True)
    head, targets = torch.randn(101, 32, device=DEVICE).to(dtype), torch.randint(0, 101, (rows + 50,), device=DEVICE)
    targets[rows:] = -100
    places = torch.randperm(rows, device=DEVICE) if skip else None
    found = []
    for devices in ((), (DEVICE,)):
        monkeypatch.setattr("nybble.engine.loss.PADDED_DEVICES", devices)
        with Rows() as met:
            loss = summed_cross_entropy(hidden, head, targets, places)
            (gradient,) = torch.autograd.grad(loss, hidden)
        found.append((loss, gradient))
    assert gradient.shape == hidden.shape
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(*found, **tolerances)
    total = rows if skip else rows + 50
    assert met.met == {min(LOSS_CHUNK, -(-left // 256) * 256) for left in range(total, 0, -LOSS_CHUNK)}


LLAMA2 = LayerShape(4096, 11008, 32, 32, 128, (48, 16, 32, 16), 2, 2)


def test_bytes_a_token_are_those_of_the_engine_s_plan():
    assert [round(kept_bytes(policy, LLAMA2) / 1024) for policy in LADDER] == [0, 8, 24, 48, 91]


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 20000), st.integers(0, 40 * 10**9))
def test_a_mix_fits_and_would_not_fit_with_more(layers, tokens, budget):
    chosen = mix(LLAMA2, layers, tokens, budget)
    assert len(chosen) == layers
    rungs = [LADDER.index(policy) for policy in chosen]
    assert rungs == sorted(rungs)
    assert rungs[-1] - rungs[0] <= 1
    taken = tokens * sum(kept_bytes(policy, LLAMA2) for policy in chosen)
    assert taken <= budget
    if rungs[0] + 1 < len(LADDER):
        one_more = tokens * (kept_bytes(LADDER[rungs[0] + 1], LLAMA2) - kept_bytes(LADDER[rungs[0]], LLAMA2))
        assert taken + one_more > budget
