"""Weights on the host: the streamed engine against the resident one, bit for bit, on a CPU by copies within its memory."""

from __future__ import annotations

import copy
import itertools

import pytest
import safetensors
import torch

from nybble.engine.fuse import attach, fuse, fusion, unfuse
from nybble.errors import EngineError
from nybble.plan.free_memory import Memory
from nybble.plan.ledger import streamed_bytes, streamed_layer_bytes
from nybble.plan.policies import LADDER
from nybble.plan.shapes import ModelShape
from nybble.weights import store
from nybble.weights.copier import CudaCopier, pinned_buffers
from nybble.weights.packed import move_weights
from nybble.weights.streamed import StreamedStore, Streaming
from tests.conftest import write_llama
from tests.engine.streaming import LateCopier, SynchronousCopier
from tests.engine.test_engine import DEVICE, assert_same, batch_of, gradients, load
from tests.engine.test_engine_plain import adapters, answer, padded, slopes, together

LAYERS = 5
POLICIES = ["auto", *LADDER]
LATER = [pytest.param(LateCopier, id="late")] if DEVICE == "cpu" else []
if DEVICE == "cuda":
    LATER.append(pytest.param(lambda: CudaCopier(torch.device("cuda", 0)), id="cuda", marks=pytest.mark.gpu))
COPIERS = [pytest.param(lambda: SynchronousCopier(DEVICE), id="at once"), *LATER]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("streamed") / "llama", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)


LATE = []
"""The copier of the model that is tested, if it checks when its buffers are read."""


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """The copier hears of every tensor that the engine dequantises from."""

    def heard(original):
        def dequantise(operations, weight, *arguments):
            for copier, tensor in itertools.product(LATE, weight.every_tensor()):
                copier.read(tensor)
            original(operations, weight, *arguments)

        return dequantise

    for name in ("dequantise", "dequantise_e4m3"):
        monkeypatch.setattr(store, name, heard(getattr(store, name)))
    yield
    LATE.clear()


def stream(model, policy="auto", copier=None, resident=0):
    """Fuse a model with weights on the host; returns what copies them."""
    copier = copier or SynchronousCopier(DEVICE)
    LATE[:] = [copier] if isinstance(copier, LateCopier) else []
    attach(model, policy, "device", Streaming(copier, resident))
    return copier


def assert_identical(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert torch.equal(ours[1][name], expected), name


def accumulated(model):
    """Three steps of two micro batches with an evaluation between them: losses, answers and gradients."""
    found = []
    for step in range(3):
        model.zero_grad()
        for micro in range(2):
            batch = batch_of(rows=1 + micro, length=20 + step, seed=10 * step + micro)
            loss = model(**batch).loss
            loss.backward()
            found.append(loss.detach())
            if step == 1:
                model.eval()
                found.append(answer(model, batch_of(seed=99)))
                model.train()
        found += [part.grad.clone() for part in adapters(model)]
    return found


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("resident", [0, 1, 3, LAYERS - 1, LAYERS])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_steps_and_evaluations_are_those_of_resident_weights_to_the_bit(llama, quant, resident, copier):
    model = load(llama, quant)
    expected = accumulated(fuse(model, "drop-qkv"))
    stream(model, "drop-qkv", copier(), resident)
    for _ in range(2):
        for ours, theirs in zip(accumulated(model), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert fusion(model).fallen_back == 0


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
def test_every_policy_gives_the_resident_gradients_to_the_bit(llama, quant, policy, copier):
    model = load(llama, quant, lora_dropout=0.1)

    def seeded():
        torch.manual_seed(3)
        return gradients(model, batch_of())

    fuse(model, policy)
    expected = [seeded() for _ in range(3)]
    stream(model, policy, copier())
    for theirs in expected:
        assert_identical(seeded(), theirs)
    assert fusion(model).last.cached_layers == 0


def test_no_weight_of_a_layer_stays_dequantised_but_those_of_resident_layers_may(llama):
    model = load(llama)
    for resident, expected in ((0, 0), (2, 2)):
        stream(model, resident=resident)
        for _ in range(3):
            gradients(model, batch_of())
        assert fusion(model).last.cached_layers == expected
        assert_identical(
            gradients(model, batch_of()), gradients(fuse(copy.deepcopy(unfuse(model)), "keep-all"), batch_of())
        )


def test_each_layer_is_copied_once_in_forward_and_once_in_backward_but_the_last_two(llama):
    model, (copier, counts) = load(llama), (SynchronousCopier(DEVICE), [])
    stream(model, "keep-all", copier)
    for work in (lambda: gradients(model, batch_of()), lambda: answer(model, batch_of())):
        for _ in range(3):
            before = copier.copies
            work()
            counts.append(copier.copies - before)
    # Forward and backward each bring the layers that the two buffers do not have; an evaluation also brings the next one's first.
    assert counts == [2 * LAYERS - 2, *[2 * (LAYERS - 2)] * 2, LAYERS - 1, LAYERS, LAYERS]


def test_a_backward_that_never_came_and_one_that_comes_twice(llama):
    model = load(llama, "nf4")
    fuse(model, "layer-input")
    expected = gradients(model, batch_of())
    stream(model, "layer-input", None if DEVICE == "cuda" else LateCopier())
    _ = model(**batch_of()).loss  # dropped
    loss = model(**batch_of()).loss
    first = torch.autograd.grad(loss, adapters(model), retain_graph=True)
    answer(model, batch_of(seed=5))
    second = torch.autograd.grad(loss, adapters(model))
    for ours, theirs, wanted in zip(first, second, expected[1].values(), strict=True):
        assert torch.equal(ours, wanted)
        assert torch.equal(theirs, wanted)


@pytest.mark.parametrize("what", ["weight", "scales"])
def test_weights_that_were_written_into_are_copied_again(llama, what):
    model = load(llama)
    stream(model)
    before = gradients(model, batch_of())
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    if what == "weight":
        state = model.state_dict()
        name = next(name for name in state if "layers.0" in name and name.endswith("down_proj.base_layer.weight"))
        model.load_state_dict({name: state[name].roll(7)}, strict=False)
    else:
        with torch.no_grad():
            layer.weight.quant_state.absmax.add_(9)
    after = gradients(model, batch_of())
    assert after[0] != before[0]
    assert_identical(after, gradients(fuse(copy.deepcopy(unfuse(model))), batch_of()))


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_the_state_dict_stays_and_unfuse_brings_the_weights_back(llama, quant, tmp_path):
    model = load(llama, quant)
    expected, before = gradients(model, batch_of()), {name: part.clone() for name, part in model.state_dict().items()}
    stream(model)
    model.to(DEVICE).float()  # as Accelerate does
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    assert is_on_host(model, weight)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name].to(DEVICE), part) for name, part in before.items())
    torch.save(state, tmp_path / "state.pt")
    assert all(torch.equal(part.to(DEVICE), before[name]) for name, part in torch.load(tmp_path / "state.pt").items())
    base = model.get_base_model()
    base.save_pretrained(tmp_path / "base", state_dict=base.state_dict())
    with safetensors.safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        name = next(name for name in file.keys() if name.endswith("layers.1.mlp.up_proj.base_layer.weight"))  # noqa: SIM118
        assert torch.equal(file.get_tensor(name), weight.data.cpu())
    unfuse(model)
    assert not is_on_host(model, weight)
    assert weight.device.type == DEVICE
    assert all(torch.equal(model.state_dict()[name], part) for name, part in before.items())
    assert_same(gradients(model, batch_of()), expected, 1e-6)
    moved = model.to(torch.float64)
    assert next(moved.parameters()).dtype == torch.float64, "a move reaches the layers again"


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_base_that_was_loaded_in_inference_mode(llama, quant):
    with torch.inference_mode():
        model = load(llama, quant)
    expected = answer(fuse(model), batch_of())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            stream(model)
            assert torch.equal(answer(model, batch_of()), expected)
            unfuse(model)
            assert torch.equal(answer(fuse(model), batch_of()), expected)


def test_a_model_fused_in_inference_mode_can_be_trained(llama):
    model = load(llama)
    fuse(model, "drop-qkv")
    expected = gradients(model, batch_of())
    with torch.inference_mode():
        stream(model, "drop-qkv")
        answer(model, batch_of())
    assert_identical(gradients(model, batch_of()), expected)


def test_a_loaded_adapter_is_used(llama, tmp_path):
    model = load(llama)
    stream(model)
    expected = gradients(model, batch_of())
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        for part in adapters(model):
            part.mul_(0.5)
    assert gradients(model, batch_of())[0] != expected[0]
    model.load_adapter(tmp_path / "adapter", "again", is_trainable=True)
    model.set_adapter("again")
    assert gradients(model, batch_of())[0] == expected[0]


def is_on_host(model, weight):
    found = fusion(model)
    return found is not None and any(
        weight.data.data_ptr() in packed.starts for packed in found.shared.streamed._packed.values()
    )


def test_fusing_again_keeps_the_weights_on_the_host_while_as_many_are_to_be_there(llama):
    model = load(llama)
    expected = gradients(fuse(model, "drop-mlp"), batch_of())
    stores = []
    for resident in (0, 0, 2):
        stream(model, "drop-mlp", resident=resident)
        stores.append(fusion(model).shared.streamed)
        assert_identical(gradients(model, batch_of()), expected)
    assert stores[0] is stores[1] is not stores[2]
    assert f"the weights of {LAYERS - 2} layers are on the host" in fusion(model).describe()
    model.get_base_model().model.layers[0].mlp.up_proj = copy.deepcopy(
        model.get_base_model().model.layers[4].mlp.up_proj
    )
    stream(model, "drop-mlp", resident=2)
    assert fusion(model).shared.streamed is not stores[2], "a layer was replaced"
    changed = gradients(model, batch_of())
    fuse(model, "drop-mlp")
    assert fusion(model).shared.streamed is None
    assert_identical(changed, gradients(model, batch_of()))


def test_fusing_again_with_other_resident_layers_never_moves_all_weights_to_the_device(llama, monkeypatch):
    model, went, remove = load(llama), [], StreamedStore.remove
    stream(model)
    expected = gradients(model, batch_of())
    monkeypatch.setattr(
        StreamedStore, "remove", lambda self, device=None: went.append(device or "the device") or remove(self, device)
    )
    attach(model, "auto", "device", Streaming(SynchronousCopier(DEVICE), 2))
    assert went == [torch.device("cpu")]
    assert_same(gradients(model, batch_of()), expected, 1e-12)
    unfuse(model)
    assert went[1:] == ["the device"]


def test_weights_that_do_not_fit_on_the_device_leave_the_model_fused(llama, monkeypatch):
    model, moves = load(llama), []
    stream(model)
    expected = gradients(model, batch_of())

    def fail(modules, device, *, copy=False):
        moves.append(device)
        if len(moves) == 3:
            raise torch.OutOfMemoryError("no memory")
        move_weights(modules, device, copy=copy)

    monkeypatch.setattr("nybble.weights.packed.move_weights", fail)
    with pytest.raises(EngineError) as caught:
        unfuse(model)
    print(caught.value)
    assert f"the weights of {LAYERS} decoder layers" in str(caught.value)
    assert fusion(model).fallen_back == 0
    assert_same(gradients(model, batch_of()), expected, 1e-12)
    unfuse(model)
    assert fusion(model) is None
    assert "_apply" not in vars(model.get_base_model().model.layers[0].mlp.up_proj.base_layer)
    assert_same(gradients(model, batch_of()), expected)


def test_an_unexpected_error_leaves_nothing_behind(llama, monkeypatch):
    model = load(llama)
    expected = gradients(model, batch_of())

    def fail(*_):
        raise RuntimeError("CUDA error: something else")

    monkeypatch.setattr("nybble.engine.fuse.EmbeddingOnHost", fail)
    with pytest.raises(RuntimeError, match="something else"):
        attach(model, "auto", "host", Streaming(SynchronousCopier(DEVICE)))
    assert fusion(model) is None
    assert not any("_apply" in vars(module) or "forward" in vars(module) for module in model.modules())
    assert_same(gradients(model, batch_of()), expected, 1e-12)


@pytest.mark.parametrize("resident", [0, 2, LAYERS - 1, LAYERS])
@pytest.mark.parametrize("quant, double", [("nf4", True), ("none", False)])
def test_the_bytes_of_the_buffers_are_as_planned(llama, quant, double, resident):
    model = load(llama, quant)
    shape = ModelShape.from_config(model.config.to_dict())
    stream(model, resident=resident)
    found = fusion(model).shared.streamed
    assert found.staging_bytes == streamed_bytes(shape, quant, double, 4, resident)
    sizes = {packed.buffer.nbytes for packed in found._packed.values()}
    assert sizes <= {streamed_layer_bytes(shape, quant, double, 4)}


# What needs the weights on the device is refused


@pytest.mark.parametrize("words, message", [
    ({"resident_layers": 1}, 'resident_layers is for weights="host"'),
    ({"resident_layers": 5, "weights": "host"}, "5 of 5 layers cannot be resident while the others are streamed"),
    ({"resident_layers": -1, "weights": "host"}, "-1 of 5 layers cannot be resident"),
])  # fmt: skip
def test_layers_that_cannot_be_resident(llama, words, message):
    model = load(llama)
    with pytest.raises(EngineError) as caught:
        fuse(model, **words)
    print(caught.value)
    assert message in str(caught.value)
    assert fusion(model) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="for a model on a CPU")
def test_a_model_on_a_cpu_has_nothing_to_stream(llama):
    model = load(llama, "none")
    with pytest.raises(EngineError, match="the model is on a CPU: its weights are on the host already") as caught:
        fuse(model, weights="host")
    assert caught.value.fix.startswith('weights="device"')
    assert fusion(model) is None


@pytest.mark.parametrize("fused_before", [False, True])
def test_a_layer_that_cannot_be_fused_is_refused_before_anything_is_moved(llama, fused_before):
    model = load(llama)
    if fused_before:
        stream(model)
    expected = gradients(model, batch_of())
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    model.get_base_model().model.layers[3].self_attn.attention_dropout = 0.5
    with pytest.raises(EngineError) as caught:
        stream(model)
    print(caught.value)
    assert "layer 3 cannot be: attention dropout of 0.5" in str(caught.value)
    assert fusion(model) is None
    assert weight.device.type == DEVICE
    model.get_base_model().model.layers[3].self_attn.attention_dropout = 0.0
    assert_same(gradients(model, batch_of()), expected)


def test_a_failure_after_the_move_brings_the_weights_back(tmp_path):
    model = load(write_llama(tmp_path / "llama", tie_word_embeddings=True))
    expected = gradients(model, batch_of())
    with pytest.raises(EngineError, match="the embedding is also the head"):
        attach(model, "auto", "host", Streaming(SynchronousCopier(DEVICE)))
    assert fusion(model) is None
    assert_same(gradients(model, batch_of()), expected, 1e-6)
    assert "_apply" not in vars(model.get_base_model().model.layers[0].mlp.up_proj.base_layer)


@pytest.mark.parametrize("trained", [False, True])
def test_a_batch_that_would_fall_back_is_refused(llama, trained):
    model = load(llama)
    stream(model)
    model.train(trained)
    with torch.set_grad_enabled(trained), pytest.raises(EngineError) as caught:
        model(**batch_of(), use_cache=True)
    print(caught.value)
    assert "their weights on the device, but they are on the host" in str(caught.value)
    assert "a key-value cache is built" in str(caught.value)
    model.get_base_model().model.layers[3].self_attn.attention_dropout = 0.5
    with pytest.raises(EngineError, match=r"attention dropout of 0\.5"):
        model(**batch_of())


def test_a_weight_that_left_its_place(llama):
    """One that was replaced by another on the device is read from there, others are refused."""
    model = load(llama, "none")
    stream(model)
    layer = model.get_base_model().model.layers[3].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(DEVICE).flip(0), requires_grad=False)
    changed = gradients(model, batch_of())
    assert_same(changed, gradients(unfuse(model), batch_of()))
    stream(model)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
    with pytest.raises(EngineError, match=r"moved to the host or replaced after nybble\.fuse"):
        gradients(model, batch_of())


def test_an_adapter_that_peft_put_on_the_host_is_refused(llama):
    model = load(llama)
    stream(model)
    layer = model.get_base_model().model.layers[2].mlp.up_proj
    layer.lora_B["default"].to("meta")
    with pytest.raises(
        EngineError, match="an adapter that was added while the weights were on the host is on meta"
    ) as caught:
        gradients(model, batch_of())
    assert str(caught.value.fix).startswith('model.to("')


@pytest.mark.parametrize("kind", COPIERS)
def test_threads_take_turns(llama, kind):
    model = load(llama)
    fuse(model, "drop-qkv")
    batch = padded([(0, 30), (5, 30)], 30)
    expected, asked = slopes(model, batch), answer(model, batch_of())
    stream(model, "drop-qkv", kind())

    def train():
        for ours, theirs in zip(slopes(model, batch), expected, strict=True):
            assert torch.equal(ours, theirs)

    def ask():
        assert torch.equal(answer(model, batch_of()), asked)

    together(train, train, ask, rounds=4)


def test_a_copy_of_the_whole_model_is_refused(llama, tmp_path):
    model = load(llama)
    stream(model)
    with pytest.raises(EngineError, match="cannot be copied or pickled") as caught:
        copy.deepcopy(model)
    assert "nybble.unfuse(model) first" in str(caught.value.fix)
    with pytest.raises(EngineError, match="cannot be copied or pickled"):
        torch.save(model, tmp_path / "model.pt")


def test_too_little_host_memory_is_refused_before_anything_is_moved(llama, monkeypatch):
    model = load(llama)
    expected = gradients(model, batch_of())
    monkeypatch.setattr("nybble.weights.copier.host_memory", lambda: Memory(1000, 2**40))
    with pytest.raises(EngineError, match=r"GB more of host memory, and 0\.00 GB is free"):
        stream(model)
    assert fusion(model) is None
    assert_same(gradients(model, batch_of()), expected)
    stream(model, resident=LAYERS)  # needs none


def test_memory_that_cannot_be_pinned_is_refused_and_what_was_moved_comes_back(llama):
    class Short(SynchronousCopier):
        def buffers(self, sizes):
            yield from super().buffers(sizes[:2])
            yield from pinned_buffers([2**60])

    model = load(llama)
    expected, before = gradients(model, batch_of()), model.state_dict()
    with pytest.raises(EngineError, match="GB of pinned host memory cannot be allocated") as caught:
        stream(model, copier=Short(DEVICE))
    print(caught.value)
    assert fusion(model) is None
    assert all("_apply" not in vars(module) for module in model.modules())
    assert all(part.device.type == DEVICE for part in model.state_dict().values())
    assert model.state_dict().keys() == before.keys()
    assert_same(gradients(model, batch_of()), expected)


def test_a_model_that_was_moved_meanwhile_is_refused(llama):
    model = load(llama)
    stream(model)
    fusion(model).shared.device = torch.device("meta")
    with pytest.raises(EngineError, match=r"the model was moved to .* while its weights were on the host for meta"):
        gradients(model, batch_of())


# The copier that checks the order


class Forgetful(LateCopier):
    """Its marks do not cover what was computed before them."""

    def mark(self):
        return 1


class Impatient(LateCopier):
    """Nobody waits for its copies."""

    def wait(self, copied, target):
        pass


@pytest.mark.parametrize(
    "kind, message",
    [(Forgetful, "filled again before it was read"), (Impatient, "read before its copy was waited for")],
)
def test_the_late_copier_notices_a_missing_event(llama, kind, message):
    model = load(llama)
    stream(model, copier=kind())
    with pytest.raises(AssertionError, match=message):
        gradients(model, batch_of())
