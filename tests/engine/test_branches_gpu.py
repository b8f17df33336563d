"""Answers that share a prompt on a GPU: torch's kernels with more keys than queries, a whole model, memory, waiting."""

from __future__ import annotations

import pytest
import torch

from nybble.engine.attention.backend import Segments
from nybble.engine.attention.cuda import Efficient, Flash
from nybble.engine.batch_layout import layout_of
from nybble.engine.branches import BranchedAttention
from nybble.engine.fuse import fuse, fusion
from nybble.plan.ledger import branch_bytes
from nybble.plan.policies import LADDER
from nybble.plan.shapes import LayerShape
from tests.conftest import write_llama
from tests.engine.branching import MIXED, Sequence, allowed, layout, masked_attention
from tests.engine.test_branches import apart, shared
from tests.engine.test_engine import load

pytestmark = pytest.mark.gpu
LONG = [Sequence(400, ((300, 129),)), Sequence(150, ((70, 1), (128, 200), (149, 64)))]
HEADS = [(8, 8, 64), (9, 3, 64), (4, 2, 128), (2, 2, 96)]


def tensors(tokens, heads, key_heads, size, dtype=torch.bfloat16):
    """Query, key and value as a layer hands them over, and a gradient of the output."""
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (heads + 2 * key_heads) * size, device="cuda", dtype=dtype)
    parts = qkv.view(tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    return parts, torch.randn(tokens, heads, size, device="cuda", dtype=dtype)


@pytest.mark.parametrize("heads, key_heads, size", HEADS)
@pytest.mark.parametrize("backend", [Flash, Efficient])
@pytest.mark.parametrize("batch", [LONG, MIXED], ids=["long", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_torch_s_for_the_mask(backend, batch, heads, key_heads, size, dtype):
    found = layout(batch, "cuda")
    parts, change = tensors(found.segments.tokens, heads, key_heads, size, dtype)
    exact, *wanted = masked_attention(parts, allowed(batch).cuda(), change)
    attention = BranchedAttention(backend(), found.branches)
    out, saved = attention.forward(*parts, found.segments)
    assert ((out - exact).norm() / exact.norm()).item() < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    for token in (len(out) - 1, 0, len(out) // 2):
        assert (out[token] - exact[token]).norm() < 1e-2 * exact[token].norm()
    for mine, theirs in zip(attention.backward(change, *parts, out, saved, found.segments), wanted, strict=True):
        assert mine.shape == theirs.shape
        assert torch.cosine_similarity(mine.float().flatten(), theirs.flatten(), dim=0) > 0.9999


def test_gradients_of_keys_and_values_are_reproducible():
    found = layout(LONG * 8, "cuda")
    parts, change = tensors(found.segments.tokens, 8, 8, 64)
    attention = BranchedAttention(Flash(), found.branches)
    out, saved = attention.forward(*parts, found.segments)
    first, *others = (attention.backward(change, *parts, out, saved, found.segments)[1:] for _ in range(5))
    for again in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))


def peak_of_backward(attention, segments, parts, change):
    """Bytes at the peak beyond those before it."""
    out, saved = attention.forward(*parts, segments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.backward(change, *parts, out, saved, segments)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("batch", [[Sequence(3000, ((2000, 1000),))] * 3, [Sequence(1200, ((1000, 200),) * 7)] * 4])
def test_memory_is_as_planned(batch):
    found = layout(batch, "cuda")
    tokens, keys = found.segments.tokens, len(found.branches.gathered)
    parts, change = tensors(tokens, 16, 16, 128)
    bounds = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device="cuda")
    ordinary = Segments(1, tokens, bounds, tokens - tokens // 2)
    shape = LayerShape(2048, 5504, 16, 16, 128, (16,) * 4, 2, 2)
    without = peak_of_backward(Flash(), ordinary, parts, change)
    with_branches = peak_of_backward(BranchedAttention(Flash(), found.branches), found.segments, parts, change)
    print(with_branches - without, branch_bytes(shape, keys))
    assert with_branches - without <= 1.02 * branch_bytes(shape, keys)
    assert with_branches - without >= 0.3 * branch_bytes(shape, keys)


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """Grouped heads of 128."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
    return write_llama(tmp_path_factory.mktemp("branches") / "middling", num_hidden_layers=4, **sizes)


@pytest.mark.parametrize("policy", [*LADDER, "auto"])
def test_a_whole_model_in_bfloat16(middling, policy):
    """It deviates from separate sequences in float32 about as separate sequences in bfloat16 do."""
    model, exact = load(middling, "none", dtype=torch.bfloat16, r=16), load(middling, "none", r=16)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    wanted = apart(exact, LONG)
    fuse(model, policy)
    found = [shared(model, LONG), apart(model, LONG)]
    assert fusion(model).fallen_back == 0
    for name, expected in wanted.items():
        strays = [
            1 - torch.cosine_similarity(part[name].float().flatten(), expected.flatten(), dim=0).item()
            for part in found
        ]
        assert strays[0] <= 1.5 * strays[1] + 1e-4, f"{name}: {strays}"


def test_quantised_weights_on_the_host(middling):
    model = load(middling, dtype=torch.bfloat16, r=16)
    resident = shared(fuse(model, "drop-qkv"), LONG)
    streamed = shared(fuse(model, "drop-qkv", weights="host"), LONG)
    assert torch.equal(streamed["out"], resident["out"])
    for name, expected in resident.items():
        assert (streamed[name] - expected).norm() <= 1e-2 * expected.norm(), name


def test_rows_without_branches_wait_for_nothing():
    """As the trainer passes them: the host never waits for the device."""
    lengths = torch.tensor([0, 11, 30], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None].cuda()
    words = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 19, "max_length_k": 19}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = layout_of({"input_ids": positions, "position_ids": positions, **words})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found.branches, found.segments.seen) == (None, None)
