"""Weights that stay dequantised where memory is left: nothing but speed may tell of them."""

from __future__ import annotations

import bisect
import copy

import pytest
import torch

from nybble.engine import memory as budget
from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.memory import Budget
from nybble.plan.ledger import MOMENTS, dequantised_bytes
from nybble.plan.policies import KEEP_ALL
from tests.conftest import write_llama
from tests.engine.test_engine import assert_same, batch_of, gradients, load

LAYERS = 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("standing") / "llama", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)


@pytest.fixture
def model(llama):
    """Fused, and past its first step: its weights stay from the second batch on."""
    fused = fuse(load(llama))
    gradients(fused, batch_of())
    assert fusion(fused).last.cached_layers == 0, "before the optimiser has its state, nobody knows what is left"
    gradients(fused, batch_of())
    assert fusion(fused).last.cached_layers == LAYERS
    return fused


def unfused(model):
    return gradients(unfuse(copy.deepcopy(model)), batch_of())


def dequantised(model, work):
    """How many weights were dequantised meanwhile."""
    count, operations = [], fusion(model).shared.operations
    original = operations.dequantize
    with pytest.MonkeyPatch.context() as patch:  # of the module: other models use it too
        patch.setattr(operations, "dequantize", lambda *args: count.append(1) or original(*args))
        work()
    return len(count)


def test_cached_weights_are_not_dequantised_again_and_change_nothing(model):
    assert dequantised(model, lambda: gradients(model, batch_of())) == 0
    found = gradients(model, batch_of())
    assert_same(found, unfused(model))
    lean = gradients(fuse(copy.deepcopy(model), "layer-input"), batch_of())
    assert_same(found, lean, 1e-6)
    assert f"spare memory keeps the weights of {LAYERS} layers dequantised" in fusion(model).describe()


def test_the_bytes_of_a_layer_are_as_planned(model):
    workspace = fusion(model).shared.workspace
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    assert workspace.cached_bytes == LAYERS * dequantised_bytes(layer.shape(torch.float32, torch.float32))


def test_adapters_are_written_again_after_a_step(model):
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    optimizer.step()
    assert dequantised(model, lambda: gradients(model, batch_of())) == 0
    assert_same(gradients(model, batch_of()), unfused(model))


def test_weights_that_were_written_into_are_read_again(model):
    before = gradients(model, batch_of())
    state = model.state_dict()
    name = next(name for name in state if "layers.1" in name and name.endswith("down_proj.base_layer.weight"))
    model.load_state_dict({name: state[name].roll(7)}, strict=False)
    after = gradients(model, batch_of())
    assert after[0] != before[0]
    assert_same(after, unfused(model))


def test_scales_that_were_written_into_are_read_again(model):
    before = gradients(model, batch_of())
    with torch.no_grad():
        model.get_base_model().model.layers[2].mlp.up_proj.base_layer.weight.quant_state.absmax.add_(9)
    after = gradients(model, batch_of())
    assert after[0] != before[0]
    assert_same(after, unfused(model))


def test_a_batch_that_is_not_fused_frees_the_cached_weights(model):
    model.eval()
    model.get_base_model().model(input_ids=batch_of()["input_ids"], use_cache=True)
    assert fusion(model).fused == 0
    assert fusion(model).shared.workspace.cached_bytes == 0


def test_an_adapter_that_was_switched_off_and_on(model):
    before = gradients(model, batch_of())
    with model.disable_adapter():
        model.get_base_model().model(input_ids=batch_of()["input_ids"])
    assert_same(gradients(model, batch_of()), before, 1e-6)


def test_evaluation_frees_the_cached_weights(model):
    before = gradients(model, batch_of())
    workspace = fusion(model).shared.workspace
    model.eval()
    with torch.no_grad():
        model(**batch_of())
    assert workspace.cached_bytes == 0
    assert_same(gradients(model.train(), batch_of()), before, 1e-6)
    assert workspace.cached_bytes > 0


def preferred(model):
    """Gradients of a step of DPO: the reference's pass comes between forward and backward."""
    model.zero_grad()
    loss = model(**batch_of()).loss
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch_of()).loss
    (loss - reference).square().backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_reference_s_pass_within_a_step_leaves_them(model):
    expected = preferred(unfuse(copy.deepcopy(model)))
    workspace = fusion(model).shared.workspace
    preferred(model)
    assert dequantised(model, lambda: preferred(model)) == 7 * LAYERS, "only for the reference, which has no adapter"
    assert workspace.cached_bytes > 0
    assert_same(preferred(model), expected)


def test_adapters_of_a_pass_without_gradients_are_those_of_now(model):
    """KTO's estimate of the KL divergence: the first pass after a step, with the adapter."""
    trained = [part for part in model.parameters() if part.requires_grad]
    torch.optim.SGD(trained, lr=0.5).step()
    with torch.no_grad():
        assert dequantised(model, lambda: model(**batch_of())) == 0
        found = model(**batch_of()).loss
        assert found.item() == pytest.approx(unfuse(copy.deepcopy(model))(**batch_of()).loss.item(), rel=1e-5)


def test_a_reference_s_pass_that_needs_the_memory_takes_it(model, monkeypatch):
    workspace = fusion(model).shared.workspace
    monkeypatch.setattr(budget, "_free", lambda device, standing: 1000)
    expected = preferred(unfuse(copy.deepcopy(model)))
    fusion(model).budget._most_cached = LAYERS
    with torch.no_grad():
        model(**batch_of())
    assert workspace.cached_bytes == 0
    assert_same(preferred(model), expected)


def test_a_batch_that_needs_the_memory_takes_it_for_good(model, monkeypatch):
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    shape = layer.shape(torch.float32, torch.float32)
    fusion(model).shared.workspace.release()

    def share(own, free):
        monkeypatch.setattr(budget, "_free", lambda device, standing: free)
        own._stepped = True
        return own.share(shape, LAYERS, 2048, [], fusion(model).shared)

    def keeps_all(free):
        return set(share(Budget(512, 64), free).policies) == {KEEP_ALL}

    least = bisect.bisect_left(range(2**32), True, key=keeps_all)
    each, own = dequantised_bytes(shape), Budget(512, 64)
    for fitting, standing in ((2.5, 2), (9, 2), (1, 1), (2, 1), (-0.1, 0), (9, 0)):
        assert share(own, int(least + fitting * each)).cached_layers == standing
    assert share(Budget(512, 64), least + 9 * each).cached_layers == LAYERS


def test_memory_for_the_optimiser_s_copies_stays_free(model, monkeypatch):
    """Between two batches torch's AdamW copies what is trained; there are no activations then, but weights that stay are."""
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    shape = layer.shape(torch.float32, torch.float32)
    each, free = dequantised_bytes(shape), 2**30
    monkeypatch.setattr(budget, "_free", lambda device, standing: free)
    for copies, standing in ((0, LAYERS), (free - 5 * each // 2, 2), (free - each // 2, 0)):
        trained = torch.nn.Parameter(torch.empty(copies // MOMENTS, device="meta"))
        trained.grad = torch.empty_like(trained)
        own = Budget(512, 64)
        own._stepped = True
        assert own.share(shape, LAYERS, 64, [trained], fusion(model).shared).cached_layers == standing


@pytest.mark.parametrize("quant, policy", [("none", "auto"), ("nf4", "keep-all"), ("nf4", "layer-input")])
def test_nothing_is_cached_in_sixteen_bits_or_with_an_explicit_policy(llama, quant, policy):
    model = fuse(load(llama, quant), policy)
    for _ in range(3):
        gradients(model, batch_of())
    assert fusion(model).last.cached_layers == 0
    assert fusion(model).shared.workspace.cached_bytes == 0
