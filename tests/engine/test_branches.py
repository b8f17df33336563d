"""Answers that share a prompt in one packed row are computed as if each had its own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nybble.engine.attention.backend import Segments
from nybble.engine.attention.plain import FlashOnCpu, PlainAttention
from nybble.engine.batch_layout import layout_of
from nybble.engine.branches import BranchedAttention
from nybble.engine.compute import Fp8, Fp8Choice
from nybble.engine.fuse import attach, fuse, fusion
from nybble.engine.memory import Share
from nybble.errors import EngineError
from nybble.plan.ledger import branch_bytes
from nybble.plan.policies import LADDER
from tests.conftest import write_llama
from tests.engine.branching import (
    CASES,
    GROUP,
    MIXED,
    PAIRS,
    Sequence,
    allowed,
    layout,
    masked_attention,
    positions_of,
    separate_rows,
    sequences,
)
from tests.engine.test_engine import DEVICE, load

FP8_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEADS = [(4, 4, 16), (9, 3, 64), (8, 1, 20)]


def embedded(model, batch):
    """Random embeddings of a batch's tokens, (tokens, h), and a gradient of the last hidden states."""
    generator = torch.Generator().manual_seed(5)
    shape = (positions_of(batch).shape[1], model.config.hidden_size)
    dtype = model.get_input_embeddings().weight.dtype
    x, change = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return x.requires_grad_(), change


def results(model, out, x, change):
    """The last hidden states, and the gradients of the embeddings and of each adapter."""
    trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
    found = torch.autograd.grad(out, [x, *trained.values()], change)
    return {"out": out.detach(), **dict(zip(["input", *trained], found, strict=True))}


def shared(model, batch):
    """Computed as one packed row."""
    x, change = embedded(model, batch)
    positions = positions_of(batch, DEVICE)
    out = model.get_base_model().model(inputs_embeds=x[None], position_ids=positions).last_hidden_state[0]
    return results(model, out, x, change)


def apart(model, batch):
    """Computed sequence by sequence, each with its own prompt."""
    x, change = embedded(model, batch)
    backbone, parts = model.get_base_model().model, []
    for row, seen in separate_rows(batch):
        parts.append(backbone(inputs_embeds=x[row][None]).last_hidden_state[0, seen:])
    return results(model, torch.cat(parts), x, change)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    most = max(part.norm() for name, part in theirs.items() if name not in ("out", "input"))
    for name, expected in theirs.items():
        difference = (ours[name] - expected).norm()
        floor = 0 if name in ("out", "input") else 1e-6 * most
        assert difference <= 2e-5 * expected.norm() + floor, f"{name}: {difference / expected.norm()}"


@pytest.fixture(scope="module", params=["grouped heads", "a key for each head"])
def plain(request, tmp_path_factory):
    """Three layers, attention that is not flat."""
    kv = 2 if request.param == "grouped heads" else 4
    folder = tmp_path_factory.mktemp("branches") / "llama"
    sizes = {"num_attention_heads": 4, "num_key_value_heads": kv, "initializer_range": 0.15, "rms_norm_eps": 1e-5}
    return load(write_llama(folder, num_hidden_layers=3, **sizes), "none")


@pytest.fixture(scope="module")
def fused(plain):
    return fuse(copy.deepcopy(plain))


@pytest.mark.parametrize("policy", [*LADDER, "auto"])
@pytest.mark.parametrize("case", CASES)
def test_a_shared_prompt_is_computed_as_each_answer_s_own(plain, case, policy):
    model = fuse(copy.deepcopy(plain), policy)
    assert_equal(shared(model, CASES[case]), apart(plain, CASES[case]))
    assert (fusion(model).fused, fusion(model).fallen_back) == (3, 0)
    assert fusion(model).shares_prompts


@settings(max_examples=25)
@given(st.lists(sequences(), min_size=1, max_size=4))
def test_any_structure(plain, fused, batch):
    assert_equal(shared(fused, batch), apart(plain, batch))


def test_quantised_weights(tmp_path):
    model = load(write_llama(tmp_path / "llama", num_hidden_layers=2))
    expected = apart(model, MIXED)
    assert_equal(shared(fuse(model, "drop-qkv"), MIXED), expected)


@pytest.mark.parametrize("policy", ["keep-all", "layer-input"])
def test_in_fp8_each_token_is_rounded_as_in_a_sequence_of_its_own(tmp_path, policy):
    """By the reference of the matrix units, whose scales are those of single tokens."""
    model = load(write_llama(tmp_path / "llama", num_hidden_layers=2), dtype=FP8_DTYPE)
    attach(model, policy, "device", fp8=Fp8Choice(Fp8()))
    ours, theirs = shared(model, PAIRS), apart(model, PAIRS)
    for name, expected in theirs.items():
        assert torch.cosine_similarity(ours[name].flatten(), expected.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("policy", ["keep-all", "drop-qkv", "host"])
def test_tiles_may_begin_anywhere(plain, policy, monkeypatch):
    monkeypatch.setattr("nybble.plan.policies.WIDE_TILE", 13)
    monkeypatch.setattr("nybble.plan.policies.NARROW_TILE", 7)
    assert_equal(shared(fuse(copy.deepcopy(plain), policy), MIXED), apart(plain, MIXED))


def test_a_batch_of_several_rows(plain, fused):
    """Branches do not cross rows: a row's first segment is a sequence, whatever its first position is."""
    rows = [[Sequence(6, ((4, 3),))], [Sequence(2), Sequence(4, ((1, 1), (3, 2)))]]
    together = torch.cat([positions_of(row) for row in rows]).to(DEVICE)
    ids = torch.randint(0, 400, together.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out = fused.get_base_model().model(input_ids=ids, position_ids=together).last_hidden_state
    for number, row in enumerate(rows):
        for places, seen in separate_rows(row):
            alone = plain.get_base_model().model(input_ids=ids[number, places][None]).last_hidden_state[0]
            torch.testing.assert_close(out[number, places[seen:]], alone[seen:], rtol=1e-4, atol=1e-4)


def test_results_are_reproducible(fused):
    first, again = shared(fused, GROUP), shared(fused, GROUP)
    for name, part in first.items():
        assert torch.equal(part, again[name]), name


def test_without_gradients(plain, fused):
    with torch.no_grad():
        x, _ = embedded(plain, PAIRS)
        positions = positions_of(PAIRS, DEVICE)
        out = fused.get_base_model().model(inputs_embeds=x[None], position_ids=positions).last_hidden_state[0]
        for row, seen in separate_rows(PAIRS):
            alone = plain.get_base_model().model(inputs_embeds=x[row][None]).last_hidden_state[0]
            torch.testing.assert_close(out[row[seen:]], alone[seen:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [FlashOnCpu, PlainAttention])
@pytest.mark.parametrize("heads, key_heads, size", HEADS)
@settings(max_examples=15)
@given(batch=st.lists(sequences(20), min_size=1, max_size=4))
def test_attention_is_torch_s_for_the_mask(backend, heads, key_heads, size, batch):
    found = layout(batch)
    assume(found.branches is not None)
    torch.manual_seed(0)
    tokens = found.segments.tokens
    qkv = torch.randn(tokens, (heads + 2 * key_heads) * size)
    parts = qkv.view(tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    change = torch.randn(tokens, heads, size)
    attention = BranchedAttention(backend(), found.branches)
    out, saved = attention.forward(*parts, found.segments)
    ours = [out, *attention.backward(change, *parts, out, saved, found.segments)]
    for mine, wanted in zip(ours, masked_attention(parts, allowed(batch), change), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=2e-5)


def test_gradients_of_a_prompt_are_added_in_float32():
    """In bfloat16, 2^-8 added to 1 is lost each time; sixteen answers' are not."""
    found = layout([Sequence(2, ((1, 1),) * 16)])
    attention = BranchedAttention(PlainAttention(), found.branches)
    gradient = torch.full((len(found.branches.gathered), 1, 1), 2.0**-8, dtype=torch.bfloat16)
    gradient[0] = 1
    assert attention._summed(gradient).flatten().tolist() == [1 + 2.0**-4, *[2.0**-8] * 17]


def test_ordinary_packed_rows_are_as_before(fused):
    positions = torch.cat([torch.arange(11), torch.arange(19), torch.arange(1)])[None]
    found = layout_of({"input_ids": torch.zeros_like(positions), "position_ids": positions})
    assert (found.branches, found.is_packed, found.padding) == (None, True, None)
    assert found.segments.bounds.tolist() == [0, 11, 30, 31]
    assert found.segments == Segments(1, 31, found.segments.bounds, 19)
    later = torch.arange(5, 9).repeat(2, 1)  # rows that start somewhere else
    assert layout_of({"input_ids": later, "position_ids": later}).segments == Segments(2, 4)
    seen = []
    share = fusion(fused).budget.share
    fusion(fused).budget.share = lambda *words: seen.append(words[-1]) or share(*words)
    shared(fused, [Sequence(3), Sequence(2)])
    del fusion(fused).budget.share
    assert seen == [0]


def test_memory_counts_the_gathered_keys(plain, monkeypatch):
    model, seen = fuse(copy.deepcopy(plain)), []
    monkeypatch.setattr(fusion(model).budget, "share", lambda *words: seen.append(words) or Share(("host",) * 3, 0))
    shared(model, GROUP)
    (shape, *_, extra), *_ = seen
    keys = 21 + 3 * 6  # the tokens of the row, and the prompt of 6 before each of three branches
    assert extra == branch_bytes(shape, keys)
    part = torch.empty(keys, shape.key_heads, shape.head_size)
    assert extra == 4 * part.nbytes, "keys, values and their gradients"


def refused(model, positions, **keywords):
    positions = torch.tensor(positions, device=DEVICE)
    with pytest.raises(EngineError) as caught:
        model(input_ids=torch.ones_like(positions), position_ids=positions, **keywords)
    print(caught.value)
    return str(caught.value)


def test_positions_that_are_neither_sequence_nor_branch(fused):
    assert "with 6 at token 3 of row 0, but the sequence before it has only positions 0 to 2" in refused(
        fused, [[0, 1, 2, 6, 7]]
    )
    message = refused(fused, [[0, 1, 2, 3, 4], [5, 6, 7, 6, 7]])
    assert "with 6 at token 3 of row 1, but the sequence before it starts at position 5" in message
    assert "0 1 2 3 4 3 4" in message
    assert "but positions start at 0" in refused(fused, [[0, 1, -1, 0, 1]])


BRANCH = [[0, 1, 2, 3, 4, 3, 4]]


def test_a_mask_beside_branches_is_refused(fused):
    mask = torch.ones(1, 7, dtype=torch.long, device=DEVICE)
    assert "leave attention_mask out" in refused(fused, BRANCH, attention_mask=mask)


def test_positions_beside_a_mask_stay_positions(plain, fused):
    """They may skip, and those of padding may be anything."""
    positions = torch.tensor([[0, 1, 2, 9, 10, 1, 1]], device=DEVICE)
    words = {"attention_mask": (torch.arange(7, device=DEVICE) < 5)[None].long(), "position_ids": positions}
    ids = torch.arange(3, 10, device=DEVICE)[None]
    ours, theirs = (model(input_ids=ids, **words).logits[:, :5] for model in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", [{"use_cache": True}, {"output_attentions": True}, {"is_causal": False}])
def test_branches_never_fall_back(fused, words):
    assert "need every decoder layer fused" in refused(fused, BRANCH, **words)


def test_branches_need_every_layer_fused(plain):
    model = copy.deepcopy(plain)
    model.get_base_model().model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    fuse(model)
    assert not fusion(model).shares_prompts
    assert "hook" in refused(model, BRANCH)
