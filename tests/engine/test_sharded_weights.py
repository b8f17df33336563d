"""Weights spread over ranks: each of two real processes computes what it computes with all weights of its own, bit for bit.

On a machine with several GPUs each process has one of them, and they exchange by NCCL.
"""

from __future__ import annotations

import copy
import functools
import itertools
import platform

import pytest
import torch
import torch.distributed

from nybble.engine.compute import Fp8, Fp8Choice
from nybble.engine.fuse import attach, fuse, fusion, unfuse
from nybble.engine.fusion import uneven_passes
from nybble.errors import EngineError
from nybble.plan.ledger import STAGING_BUFFERS, share_bytes, streamed_layer_bytes
from nybble.plan.policies import LADDER
from nybble.plan.shapes import ModelShape
from nybble.weights.packed import places
from nybble.weights.sharded import ShardCopier
from nybble.weights.streamed import Streaming
from tests.conftest import write_llama
from tests.engine.test_engine import DEVICE, batch_of, gradients, load
from tests.engine.test_engine_plain import adapters, answer
from tests.engine.test_streamed_weights import accumulated
from tests.ranks import explained, run_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="each of two ranks needs a GPU, or there must be none"
)

RANKS, LAYERS = 2, 5
KINDS = ("nf4", "fp4", "none")


def rank():
    return torch.distributed.get_rank()


def batch(seed=0):
    """Another one on each rank, of the same size."""
    return batch_of(seed=10 * seed + rank())


def same(ours, theirs):
    return ours[0] == theirs[0] and all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])


def every_policy(llama):
    """Gradients under every policy, of every kind of weights, with dropout: how many of them are not the resident ones."""
    wrong = []
    for kind, policy in itertools.product(KINDS, ["auto", *LADDER]):
        model = load(llama, kind, lora_dropout=0.1)
        for where in ("device", "sharded"):
            fuse(model, policy, weights=where)
            torch.manual_seed(3)
            found = [gradients(model, batch(seed)) for seed in range(2)]
            if where == "device":
                expected = found
        wrong += [(kind, policy) for ours, theirs in zip(found, expected, strict=True) if not same(ours, theirs)]
        wrong += [(kind, policy, "fell back")] * fusion(model).fallen_back
    return wrong


def resident_layers(llama):
    """Three steps with an evaluation, for each number of layers that stay on the device."""
    model, wrong = load(llama), []
    expected = accumulated(fuse(model, "drop-qkv"))
    for resident in (0, 1, 3, LAYERS - 1):
        fuse(model, "drop-qkv", weights="sharded", resident_layers=resident)
        found = accumulated(model)
        wrong += [resident] * (not all(map(torch.equal, found, expected)))
    return wrong


def in_fp8(llama):
    """The same in fp8, on a CPU by its reference; scales are read from the weights."""
    model = load(llama, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32, lora_dropout=0.1)
    found = []
    for streaming in (None, Streaming(ShardCopier(model.device))):
        attach(model, "drop-qkv", "device", streaming, Fp8Choice(Fp8()))
        torch.manual_seed(3)
        found.append(gradients(model, batch()))
    return same(*found)


def uneven(llama):
    """Ranks with different numbers of passes, one of which fails in the middle."""
    model = fuse(load(llama)).eval()
    expected = [answer(model, batch_of(length=20 + seed, seed=seed)) for seed in range(4)]
    fuse(model, weights="sharded")
    wrong, failed = [], []
    for round_ in range(2):
        with uneven_passes(model):
            for seed in range(4) if rank() == round_ else range(round_):
                if rank() == 0 and seed == 2:
                    failed.append(_fail_in_layer(model, 2))
                if not torch.equal(answer(model, batch_of(length=20 + seed, seed=seed)), expected[seed]):
                    wrong.append((round_, seed))
    training = same(gradients(model, batch()), gradients(fuse(model), batch()))
    return wrong, failed, training


def _fail_in_layer(model, number):
    def fail(*_):
        raise MemoryError("in the middle of a pass")

    layer = model.get_base_model().model.layers[number]
    handle = layer.register_forward_pre_hook(fail)
    try:
        answer(model, batch_of())
    except MemoryError as error:
        return str(error)
    finally:
        handle.remove()
    return "nothing failed"


def memory(llama):
    """Bytes of the weights on this rank before and after, and of the buffers; what the layers' own parameters have."""
    model = load(llama)
    layers = [module for layer in fuse(model).get_base_model().model.layers for module in _linears(layer)]
    before = _held(layers)
    fuse(model, weights="sharded")
    store = fusion(model).shared.streamed
    with torch.no_grad():
        misused = layers[0](torch.ones(1, 3, layers[0].in_features, device=DEVICE))
    return {
        "before": before, "stand-ins": _held(layers), "shares": sum(each.buffer.nbytes for each in store._packed.values()),
        "staging": store.staging_bytes, "described": fusion(model).describe(), "misused": misused.cpu(),
        "planned": share_bytes(streamed_layer_bytes(ModelShape.from_config(model.config.to_dict()), "nf4", True, 4), RANKS),
    }  # fmt: skip


def _linears(layer):
    modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj]
    modules += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    return [module.base_layer for module in modules]


def _held(modules):
    """Bytes of memory, tables not counted."""
    tensors = [getattr(owner, name) for owner, name in places(modules) if name in ("data", "absmax")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def unfused(llama):
    """The weights come together again, with every bit, in memory of their own, and can be fused again."""
    wrong = []
    for kind in KINDS:
        model = load(llama, kind)
        before = {name: part.clone() for name, part in model.state_dict().items()}
        expected = gradients(fuse(model), batch())
        unfuse(fuse(model, weights="sharded"))
        after = model.state_dict()
        wrong += [(kind, name) for name, part in before.items() if not torch.equal(after[name], part)]
        wrong += [kind] * (not same(gradients(fuse(model, weights="sharded"), batch()), expected))
        fuse(model, weights="sharded", resident_layers=1)
        wrong += [(kind, "again")] * (not same(gradients(model, batch()), expected))
    return wrong


def cannot_be_unfused(llama):
    """One rank lacks the memory to bring a layer together: all say so, and can go on."""
    wrong, said = [], []
    model = load(llama)
    expected = gradients(fuse(model), batch())
    for layer in (0, 2):
        fuse(model, weights="sharded")
        usual, calls = ShardCopier.device_buffer, []

        def short(self, size, usual=usual, calls=calls, layer=layer):
            calls.append(size)
            if rank() == 1 and len(calls) == layer + 1:
                raise torch.OutOfMemoryError
            return usual(self, size)

        ShardCopier.device_buffer = short
        try:
            unfuse(model)
        except EngineError as error:
            said.append(str(error))
        ShardCopier.device_buffer = usual
        wrong += [layer] * (not same(gradients(model, batch()), expected))
        unfuse(model)
        wrong += [(layer, "unfused")] * (not same(gradients(fuse(model), batch()), expected))
    return wrong, said


def groups(llama):
    """How many process groups there are after fusing again and again."""
    model = load(llama)
    for resident in (0, 1, 0):
        fuse(model, weights="sharded", resident_layers=resident)
        unfuse(model)
    return len(torch.distributed.distributed_c10d._world.pg_map)


def refused(llama):
    """What is said where it does not work; all ranks must be able to go on."""
    model = load(llama)
    said = {}

    def refusal(name, act):
        try:
            act()
            said[name] = "nothing was refused"
        except (EngineError, RuntimeError) as error:
            said[name] = str(error)

    def too_little(self, sizes):
        if rank() == 1:
            raise torch.OutOfMemoryError
        return [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in sizes]

    usual, ShardCopier._share_buffers = ShardCopier._share_buffers, too_little
    refusal("memory", lambda: fuse(model, weights="sharded"))
    ShardCopier._share_buffers = usual
    weights = copy.deepcopy(model.state_dict())
    expected = gradients(fuse(model), batch())
    if DEVICE == "cpu":
        refusal("host", lambda: fuse(model, weights="sharded-host"))
    fuse(model, weights="sharded")
    refusal("copy", lambda: copy.deepcopy(model))
    refusal("write", lambda: model.load_state_dict(weights))
    said["goes on"] = same(gradients(model, batch()), expected)
    return said


def trained(llama):
    """DDP over the ranks: adapters that are trained with sharded weights are those of resident ones."""
    found = []
    for where in ("device", "sharded"):
        model = load(llama)
        parts = adapters(model)
        for part in parts:
            part.requires_grad_(False)
        fuse(model, weights=where)
        for part in parts:  # as an adapter that is switched to later: DDP must not have been told to leave it out
            part.requires_grad_(True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(adapters(model), lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            wrapped(**batch(step)).loss.backward()
            optimizer.step()
        found.append([part.detach().clone() for part in adapters(model)])
    return all(map(torch.equal, *found)), found[1][0].cpu()


SCENES = (every_policy, resident_layers, in_fp8, uneven, memory, unfused, cannot_be_unfused, groups, refused, trained)


def all_scenes(llama):
    found = {}
    for scene in SCENES:
        print(rank(), scene.__name__, flush=True)  # where a rank crashes, this is all that tells
        found[scene.__name__] = explained(functools.partial(scene, llama))
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("sharded") / "llama", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def found(llama, tmp_path_factory):
    """What the ranks found, by scene: starting them takes longer than all scenes."""
    results = run_ranks(RANKS, tmp_path_factory.mktemp("ranks"), all_scenes, llama)
    return {scene.__name__: [result[scene.__name__] for result in results] for scene in SCENES}


def test_every_policy_gives_the_resident_gradients_to_the_bit(found):
    assert found["every_policy"] == [[], []]


def test_steps_and_evaluations_are_those_of_resident_weights_with_any_number_of_resident_layers(found):
    assert found["resident_layers"] == [[], []]


def test_fp8_reads_its_scales_from_what_was_gathered(found):
    assert found["in_fp8"] == [True, True]


def test_ranks_may_run_different_numbers_of_passes_even_if_one_of_them_fails(found):
    first, second = found["uneven"]
    assert first == ([], ["in the middle of a pass"], True)
    assert second == ([], [], True)


def test_a_rank_holds_its_share_and_two_layers(found):
    for one in found["memory"]:
        print(one)
        assert one["staging"] == STAGING_BUFFERS * one["shares"] * RANKS // LAYERS
        assert one["shares"] == LAYERS * one["planned"]
        assert one["stand-ins"] < 0.01 * one["before"]
        assert one["misused"].isnan().all(), "what computes with a stand-in is not a number"
        assert "the weights of 5 layers are spread over 2 ranks" in one["described"]


def test_unfuse_brings_every_bit_back(found):
    assert found["unfused"] == [[], []]


def test_a_failed_unfuse_leaves_the_model_as_it_was_on_all_ranks(found):
    for wrong, said in found["cannot_be_unfused"]:
        print(said)
        assert wrong == []
        assert len(said) == 2
        assert "do not fit on the device" in said[0]
        assert "leave the model fused: saving the adapter works as it is" in said[0]


def test_all_models_of_a_process_share_one_group(found):
    assert found["groups"] == [2, 2], "and the one of all processes"


def test_what_does_not_work_is_refused_by_all_ranks(found):
    for said in found["refused"]:
        print({name: str(text)[:200] for name, text in said.items()})
        assert "the share of the weights that rank 1 should hold is too large for it: " in said["memory"]
        assert f"GB do not fit on {DEVICE}" in said["memory"]
        assert "engine.weights=sharded-host" in said["memory"]
        assert DEVICE == "cuda" or "its weights are on the host already" in said["host"]
        assert "whose weights are spread over 2 ranks cannot be copied or pickled" in said["copy"]
        assert "single memory location" in said["write"], "nothing can be written into a stand-in"
        assert said["goes on"]


def test_data_parallel_training_is_the_same(found):
    (one, first), (other, second) = found["trained"]
    assert one
    assert other
    assert torch.equal(first, second), "the ranks have the same adapter"


def on_machines(llama, names):
    """Whether gradients are the resident ones, and how many ranks share, where each rank believes to be on the machine named."""
    platform.node = lambda: names[rank()]
    model = load(llama)
    expected = gradients(fuse(model), batch())
    return same(gradients(fuse(model, weights="sharded"), batch()), expected), fusion(
        model
    ).shared.streamed.copier.ranks


@pytest.mark.slow
@pytest.mark.parametrize(("names", "sharing"), [("abab", 2), ("aaab", 4)])
def test_ranks_of_a_machine_share_unless_one_is_alone(llama, names, sharing, tmp_path):
    assert run_ranks(4, tmp_path, on_machines, llama, names) == [(True, sharing)] * 4


def test_a_process_alone_cannot_share(llama):
    with pytest.raises(EngineError, match="this process runs alone") as caught:
        fuse(load(llama), weights="sharded")
    print(caught.value)
    assert "--processes 2" in caught.value.fix


def test_shares_of_a_layer_are_equal_and_aligned():
    assert share_bytes(1000, 3) == 512
    assert [share_bytes(size, 2) for size in (1, 512, 513)] == [256, 256, 512]
