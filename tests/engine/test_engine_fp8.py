"""Whole models trained in fp8, on a CPU by the reference or on the GPU by its matrix units."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch

from nybble.engine import compute
from nybble.engine.compute import Fp8, Fp8Choice, check_type, choose_fp8
from nybble.engine.fuse import attach, fuse, fusion, unfuse
from nybble.engine.layer import GROUPS
from nybble.errors import EngineError
from nybble.plan.ledger import dequantised_bytes, workspace_bytes
from nybble.plan.policies import KEEP_ALL
from nybble.preflight.doctor.gpu import number_formats
from nybble.weights.streamed import Streaming
from tests.conftest import write_llama
from tests.engine.streaming import LateCopier, SynchronousCopier
from tests.engine.test_engine import DEVICE, POLICIES, assert_same, batch_of, cosine, gradients, load

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LAYERS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers, grouped heads."""
    return write_llama(tmp_path_factory.mktemp("fp8") / "llama", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)


def in_fp8(model, policy="auto", streaming=None, **options):
    """Fuse, whatever the device."""
    return attach(model, policy, "device", streaming, Fp8Choice(Fp8(**options)))


def products(model, work):
    """How many products were computed in fp8 meanwhile."""
    count, operations = [], fusion(model).shared.operations
    original = operations.scaled_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "scaled_product", lambda *args: count.append(1) or original(*args))
        work()
    return len(count)


def identical(ours, theirs):
    return ours[0] == theirs[0] and all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def assert_alike(ours, theirs):
    """All gradients together, and the worst tensor: the query's of a random model are small differences of large numbers."""
    whole = torch.cosine_similarity(
        *(torch.cat([found[n].flatten() for n in theirs]) for found in (ours, theirs)), dim=0
    )
    print(whole.item(), cosine(ours, theirs))
    assert whole > 0.997  # measured 0.9975 to 0.9998
    assert cosine(ours, theirs) > 0.99


@pytest.mark.parametrize("policy", [*POLICIES, "auto"])
@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
def test_gradients_point_where_those_in_float32_do_under_every_policy(llama, quant, policy):
    model = load(llama, quant, DTYPE)
    expected = gradients(model, batch_of())
    in_fp8(model, policy)
    found = gradients(model, batch_of())
    print(quant, policy, cosine(found[1], expected[1]), found[0] - expected[0])
    assert_alike(found[1], expected[1])
    assert found[0] == pytest.approx(expected[0], abs=0.02)
    assert found[0] != expected[0]
    assert fusion(model).fallen_back == 0
    unfuse(model)
    assert_same(gradients(model, batch_of()), expected)


def test_what_a_policy_recomputes_is_what_was_computed(llama):
    model = load(llama, dtype=DTYPE, lora_dropout=0.1)

    def seeded():
        torch.manual_seed(3)
        return gradients(model, batch_of())

    expected = (in_fp8(model, KEEP_ALL), seeded())[1]
    for policy in POLICIES:
        in_fp8(model, policy)
        assert_same(
            seeded(), expected, 1e-6 if torch.float32 == DTYPE else 0.02
        )  # another order of sums in silu(gate) x up


def test_evaluation_is_that_of_16_bits_to_the_bit_and_training_mode_is_not(llama):
    model = load(llama, dtype=DTYPE)
    batch = batch_of()

    def answer():
        with torch.no_grad():
            return model(**batch).logits

    fuse(model)
    trained, evaluated = answer(), (model.eval(), answer())[1]
    in_fp8(model)
    assert products(model, lambda: answer()) == 0
    assert torch.equal(answer(), evaluated)
    model.train()
    assert (
        products(model, lambda: answer()) == 4 * LAYERS
    )  # a frozen reference answers as the trained model starts (DPO)
    assert not torch.equal(answer(), trained)
    model.eval()
    assert products(model, lambda: gradients(model, batch)) == 8 * LAYERS - 1, "gradients are computed as in training"


def test_an_adapter_that_is_switched_off_leaves_the_base(llama):
    model = in_fp8(load(llama, dtype=DTYPE))
    with torch.no_grad(), model.disable_adapter():
        off = model(**batch_of()).logits
    for name, part in model.named_parameters():
        if "lora_B" in name:
            part.data.zero_()
    with torch.no_grad():
        error = (model(**batch_of()).logits - off).abs().max() / off.abs().max()
    assert error < (1e-6 if torch.float32 == DTYPE else 0.02)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ((), [4, 4, 4]),
        (("down_proj",), [3, 3, 3]),
        (("q_proj",), [3, 3, 3]),
        (("mlp",), [2, 2, 2]),
        (("layers.0", "layers.2"), [0, 4, 0]),
        (("model.layers.1.mlp.down_proj", "self_attn"), [2, 1, 2]),
        (("base_model.model.model.layers.2",), [4, 4, 0]),
    ],
)
def test_what_is_left_out_by_name_stays_in_16_bits(llama, skip, expected):
    model = load(llama, dtype=DTYPE)
    plain = gradients(model, batch_of())
    in_fp8(model, KEEP_ALL, skip=skip)
    assert [len(Fp8(skip).groups(layer)) for layer in range(LAYERS)] == expected
    nothing_below = 1 if "qkv" in Fp8(skip).groups(0) else 0
    assert products(model, lambda: gradients(model, batch_of())) == 2 * sum(expected) - nothing_below
    assert_alike(gradients(model, batch_of())[1], plain[1])
    if skip:
        assert f"in 16 bits: {', '.join(skip)}" in fusion(model).describe()


@pytest.mark.parametrize("skip", [["layers"], ["mlp", "self_attn"], "down_proj"])
def test_names_that_leave_nothing_and_a_text_are_refused(llama, skip):
    with pytest.raises(EngineError) as caught:
        fuse(load(llama), compute="fp8-if-possible", fp8_skip=skip)
    print(caught.value)
    said = (
        "is a text, not a list of names: 'down_proj'"
        if skip == "down_proj"
        else f"leaves nothing in fp8: {', '.join(skip)}"
    )
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head", "layers.3", "proj", "", ".", "0", "model.layers.3"])
def test_a_name_that_is_nothing_here_is_refused(llama, name):
    with pytest.raises(EngineError) as caught:
        fuse(load(llama), compute="fp8-if-possible", fp8_skip=[name])
    print(caught.value)
    assert f"fp8_skip: {name!r} is no projection and no layer of this model" in str(caught.value)
    assert "layers.2.mlp" in str(caught.value)


def test_unknown_values_are_refused(llama):
    for options, what in (
        ({"compute": "int8"}, "there is no compute 'int8'"),
        ({"compute": "fp8", "fp8_fast": "sideways"}, "fp8_fast cannot be 'sideways'"),
    ):
        with pytest.raises(EngineError) as caught:
            fuse(load(llama), **options)
        print(caught.value)
        assert what in str(caught.value)


class Card:
    """What torch says about a card."""

    def __init__(self, monkeypatch, name, capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("name", "capability", "has"),
    [("NVIDIA A100", (8, 0), False), ("Tesla T4", (7, 5), False), ("NVIDIA L4", (8, 9), True), ("H200", (9, 0), True)],
)
def test_cards_without_fp8_units_are_told_apart(monkeypatch, name, capability, has):
    Card(monkeypatch, name, capability)
    device = torch.device("cuda")
    if has:
        assert choose_fp8("fp8", (), "both", device, torch.bfloat16, 3) == Fp8Choice(Fp8((), (True, True)))
        return
    with pytest.raises(EngineError) as caught:
        choose_fp8("fp8", (), "none", device, torch.bfloat16, 3)
    print(caught.value)
    assert f"{name} (compute capability {capability[0]}.{capability[1]}) has no fp8 units" in str(caught.value)
    assert "engine.compute" in str(caught.value)
    assert choose_fp8("fp8-if-possible", (), "none", device, torch.bfloat16, 3).fp8 is None


def test_a_model_in_float16_is_refused_when_it_is_fused(monkeypatch):
    Card(monkeypatch, "H200", (9, 0))
    with pytest.raises(
        EngineError, match="cannot be computed in fp8: its products give bfloat16, but the model is in float16"
    ):
        choose_fp8("fp8", (), "none", torch.device("cuda"), torch.float16, 3)
    fallen_back = choose_fp8("fp8-if-possible", (), "none", torch.device("cuda"), torch.float16, 3)
    assert (fallen_back.fp8, "the model is in float16" in fallen_back.missing) == (None, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="of a CPU")
def test_a_cpu_has_none_and_if_possible_falls_back_and_says_so(llama, caplog):
    model = load(llama)
    with pytest.raises(EngineError, match="cannot be computed in fp8: cpu has no fp8 units"):
        fuse(model, compute="fp8")
    assert fusion(model) is None
    with caplog.at_level(logging.WARNING):
        fuse(model, compute="fp8-if-possible")
    said = "computed in 16 bits, not in fp8: cpu has no fp8 units"
    assert said in caplog.text
    assert said in fusion(model).describe()
    assert products(model, lambda: gradients(model, batch_of())) == 0


def test_shapes_that_do_not_divide_are_named(tmp_path):
    model = load(write_llama(tmp_path / "llama", hidden_size=64, intermediate_size=120), "none", DTYPE)
    with pytest.raises(EngineError) as caught:
        in_fp8(model)
    print(caught.value)
    assert "layer 0: 120 inputs and 64 outputs of down_proj, but fp8 units need multiples of 16" in str(caught.value)
    assert fusion(model) is None
    assert gradients(model, batch_of())
    in_fp8(model, skip=("mlp",))
    assert products(model, lambda: gradients(model, batch_of())) > 0


def test_only_bfloat16_comes_out_of_fp8_units():
    check_type(torch.bfloat16, torch.device("cuda"))
    check_type(torch.float32, torch.device("cpu"))
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(EngineError) as caught:
            check_type(dtype, torch.device("cuda"))
        print(caught.value)
        assert f"the model computes in {str(dtype)[6:]}" in str(caught.value)


@pytest.mark.skipif(DEVICE == "cuda", reason="copiers within the memory of a CPU")
@pytest.mark.parametrize("copier", [SynchronousCopier, LateCopier])
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_streamed_weights_give_the_resident_gradients_to_the_bit(llama, quant, resident, copier):
    model = load(llama, quant)
    in_fp8(model, "drop-qkv")
    expected = gradients(model, batch_of())
    in_fp8(model, "drop-qkv", Streaming(copier(), resident))
    assert identical(gradients(model, batch_of()), expected)
    assert identical(gradients(model, batch_of()), expected)


def test_weights_stay_in_e4m3_where_memory_is_left_and_change_nothing(llama):
    model = load(llama, dtype=DTYPE)
    lean = (in_fp8(model, KEEP_ALL), gradients(model, batch_of()))[1]
    in_fp8(model)
    assert identical(gradients(model, batch_of()), lean)
    assert fusion(model).last.cached_layers == 0
    written = []
    operations = fusion(model).shared.operations
    with pytest.MonkeyPatch.context() as patch:
        original = operations.dequantize_e4m3
        patch.setattr(operations, "dequantize_e4m3", lambda *args: written.append(1) or original(*args))
        assert identical(gradients(model, batch_of()), lean)
        assert fusion(model).last.cached_layers == LAYERS
        first = len(written)
        assert identical(gradients(model, batch_of()), lean)
    assert 0 < first == len(written), "once for each direction, and never again"
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    shape = layer.shape(DTYPE, DTYPE, GROUPS)
    assert fusion(model).shared.workspace.cached_bytes == LAYERS * dequantised_bytes(shape)


def test_adapters_are_written_again_after_a_step(llama):
    model = in_fp8(load(llama, dtype=DTYPE))
    for _ in range(2):
        gradients(model, batch_of())
    torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.5).step()
    found = gradients(model, batch_of())
    assert fusion(model).last.cached_layers == LAYERS
    assert identical(found, gradients(in_fp8(copy.deepcopy(model), KEEP_ALL), batch_of()))


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_workspace_is_as_planned_and_evaluation_needs_no_larger_one(llama, monkeypatch, tiles):
    for name in ("WIDE_TILE", "MIDDLE_TILE", "NARROW_TILE"):
        monkeypatch.setattr(f"nybble.plan.policies.{name}", -(-2 * 37 // tiles))
    model = in_fp8(load(llama, dtype=DTYPE), "layer-input")
    plain = gradients(fuse(copy.deepcopy(model), "layer-input"), batch_of())
    assert_alike(gradients(model, batch_of())[1], plain[1])
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    shape = layer.shape(DTYPE, DTYPE, GROUPS)
    assert fusion(model).shared.workspace.reserved_bytes == workspace_bytes(shape, tiles)
    model.eval()
    with torch.no_grad():
        model(**batch_of())
    if torch.bfloat16 == DTYPE:
        assert fusion(model).shared.workspace.reserved_bytes == workspace_bytes(shape, tiles)


def test_describe_says_what_is_computed_in_fp8(llama):
    model = in_fp8(load(llama, dtype=DTYPE), fast=(True, True), skip=("down_proj",))
    gradients(model, batch_of())
    print(fusion(model).describe())
    assert re.search(
        r"^trained in fp8 \(fast sums: forward and backward; in 16 bits: down_proj\), evaluated in 16 bits$",
        fusion(model).describe(),
        re.MULTILINE,
    )
    in_fp8(model, fast=(False, False))
    assert "trained in fp8 (fast sums: none), evaluated in 16 bits" in fusion(model).describe()


def test_the_doctor_and_the_engine_agree_which_cards_have_fp8():
    major, minor = compute.OLDEST
    assert "fp8" in number_formats((major, minor))
    assert "fp8" not in number_formats((major, minor - 1))
