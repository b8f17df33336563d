"""What only a GPU shows: attention's backends, memory as planned, copies beside the computation, and streams."""

from __future__ import annotations

import gc

import pytest
import torch

from nybble.engine.attention.backend import Segments
from nybble.engine.attention.cuda import Cudnn, Efficient, Flash
from nybble.engine.attention.plain import PlainAttention
from nybble.engine.fuse import fuse, fusion, unfuse
from nybble.engine.padding import PaddedAttention, separate
from nybble.errors import EngineError
from nybble.generate.kept import KeptGenerator
from nybble.generate.padded import Padded
from nybble.generate.request import Request, complete
from nybble.plan.ledger import kept_bytes, streamed_bytes, streamed_layer_bytes
from nybble.plan.policies import HOST, LADDER
from nybble.plan.shapes import ModelShape
from tests.conftest import write_llama
from tests.engine.test_engine import assert_same, cosine, gradients, load
from tests.engine.test_engine_plain import adapters, answer, padded, slopes, together

pytestmark = pytest.mark.gpu
CASES = [(8, 8, 64), (9, 3, 64), (4, 2, 128), (2, 2, 96)]


@pytest.mark.parametrize("heads, key_heads, size", CASES)
@pytest.mark.parametrize("backend", [Cudnn, Flash, Efficient])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_plain_torch_s(backend, packed, heads, key_heads, size, dtype):
    if packed and backend is Cudnn:
        pytest.skip("for equal lengths")
    torch.manual_seed(0)
    tokens, width = 2 * 123, (heads + 2 * key_heads) * size
    bounds = torch.tensor([0, 6, 48, 171, 246], dtype=torch.int32, device="cuda") if packed else None
    segments = Segments(2, 123, bounds, 123)
    qkv = torch.randn(tokens, width, device="cuda", dtype=dtype)
    parts = qkv.view(tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    change = torch.randn(tokens, heads, size, device="cuda", dtype=dtype)
    out, saved = backend().forward(*parts, segments)
    exact, logs = PlainAttention().forward(*(part.float() for part in parts), segments)
    assert ((out - exact).norm() / exact.norm()).item() < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    ours = backend().backward(change, *parts, out, saved, segments)
    theirs = PlainAttention().backward(change.float(), *(part.float() for part in parts), exact, logs, segments)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.shape == wanted.shape
        assert torch.cosine_similarity(mine.float().flatten(), wanted.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("heads, key_heads, size", CASES)
@pytest.mark.parametrize("rows, across", [(Cudnn, Flash), (Flash, Flash), (Efficient, Efficient)])
@pytest.mark.parametrize("spans", [[(0, 123), (0, 70), (0, 1)], [(5, 100), (0, 123), (123, 123), (122, 123)]])
def test_padded_rows_are_what_torch_gives_for_their_mask(rows, across, spans, heads, key_heads, size):
    """In bfloat16, against torch's masked attention in float32."""
    if rows is Cudnn and spans[0][0]:
        pytest.skip("for equal lengths")
    torch.manual_seed(0)
    place = torch.arange(123, device="cuda")
    mask = torch.stack([(begin <= place) & (place < end) for begin, end in spans])
    segments, padding = separate(spans, 123, mask.device)
    qkv = torch.randn(segments.tokens, (heads + 2 * key_heads) * size, device="cuda", dtype=torch.bfloat16)
    parts = qkv.view(segments.tokens, -1, size).split([heads, key_heads, key_heads], dim=1)
    change = torch.randn(segments.tokens, heads, size, device="cuda", dtype=torch.bfloat16)
    exact = [part.float().requires_grad_() for part in parts]
    q, k, v = (part.unflatten(0, (len(spans), 123)).transpose(1, 2) for part in exact)
    allowed = mask[:, None, None] & torch.ones(123, 123, dtype=torch.bool, device="cuda").tril()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    wanted = wanted.transpose(1, 2).flatten(0, 1)
    wanted.backward(change.float())
    backend = PaddedAttention(rows(), across(), padding)
    out, saved = backend.forward(*parts, segments)
    ours = backend.backward(change, *parts, out, saved, segments)
    for place in (padding.positions, padding.late, ...):
        if place is ... or len(place):
            difference = out[place].float() - wanted[place]
            assert difference.norm() <= 5e-3 * wanted[place].norm()
    for mine, part in zip(ours, exact, strict=True):
        assert torch.cosine_similarity(mine.float().flatten(), part.grad.flatten(), dim=0) > 0.9999


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """Large enough that a megabyte of overhead does not count."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
    return write_llama(tmp_path_factory.mktemp("gpu") / "middling", num_hidden_layers=6, **sizes)


def test_kept_bytes_are_as_planned(middling):
    """Each policy's bytes a token and layer within 10% of what the allocator holds more than under `host`."""
    model = load(middling, dtype=torch.bfloat16, r=16)
    ids = torch.randint(0, 400, (4, 1024), device="cuda")
    held = {}
    for policy in LADDER:
        fuse(model, policy)
        for _ in range(2):
            gc.collect()
            before = torch.cuda.memory_allocated()
            out = model.get_base_model().model(input_ids=ids).last_hidden_state
            held[policy] = torch.cuda.memory_allocated() - before
            out.sum().backward()
            model.zero_grad()
            del out
    layer, *_ = fusion(model).read(list(fusion(model).readers))[0].values()
    shape = layer.shape(torch.bfloat16, torch.bfloat16)
    for policy in LADDER[1:]:
        measured = (held[policy] - held[HOST]) / (6 * ids.numel())
        print(policy, measured, kept_bytes(policy, shape))
        # Under `host` the last layers' inputs are still on their way when forward ends.
        assert measured == pytest.approx(kept_bytes(policy, shape), rel=0.1, abs=2 * 2 * 1024 * 2 / 6)


def test_memory_stays_flat_over_lengths(middling):
    model = fuse(load(middling, dtype=torch.bfloat16, r=16), "layer-input")
    generator = torch.Generator().manual_seed(0)
    peaks = []
    for step in range(200):
        length = 1024 if step < 2 else int(torch.randint(16, 1025, (), generator=generator))
        ids = torch.randint(0, 400, (4, length), device="cuda")
        gradients(model, {"input_ids": ids, "labels": ids})
        if step in (19, 199):
            peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[1] <= 1.02 * peaks[0]


def test_float16_with_loss_scaling_learns_as_bfloat16(middling):
    ids = torch.randint(0, 400, (4, 256), device="cuda")
    ends = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = fuse(load(middling, dtype=dtype, r=16), "layer-input")
        trained = [part for part in model.parameters() if part.requires_grad]
        optimizer, scaler = (
            torch.optim.AdamW(trained, lr=1e-3),
            torch.amp.GradScaler("cuda", enabled=dtype == torch.float16),
        )
        for _ in range(30):
            loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends[dtype] = loss.item()
    assert ends[torch.float16] == pytest.approx(ends[torch.bfloat16], abs=0.1)
    assert ends[torch.float16] < 5.5


SPANS = {"right": [(0, 200), (0, 90), (0, 3)], "left": [(0, 200), (77, 200), (190, 200)], "both": [(40, 160), (0, 200)]}


@pytest.mark.parametrize("kind", SPANS)
def test_padding_deviates_no_more_than_real_tokens(middling, kind):
    """Logits in bfloat16 against the plain path's: at padding behind real tokens, whose labels somebody may train, as everywhere.

    Padding before them sees nothing, and what torch's kernels for CUDA give there is not the zeros of the others.
    """
    model, batch = load(middling, dtype=torch.bfloat16, r=16), padded(SPANS[kind], 200)
    real = batch["attention_mask"].bool()
    seeing = batch["attention_mask"].cumsum(dim=1) > 0
    batch["labels"] = batch["labels"].masked_fill(~seeing, -100)
    wanted, expected = answer(model, batch).float(), gradients(model, batch)
    fuse(model)
    difference, ours = (answer(model, batch).float() - wanted).norm(dim=-1), gradients(model, batch)
    assert fusion(model).fallen_back == 0
    late, others = ((difference[part] / wanted[part].norm(dim=-1)).mean().item() for part in (seeing & ~real, real))
    print(late, others, cosine(ours[1], expected[1]))
    assert others < 0.05
    assert kind == "left" or late < 3 * others
    assert ours[0] == pytest.approx(expected[0], rel=2e-3)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("policy", ["auto", "host"])
def test_threads_on_one_stream_and_on_their_own(middling, policy, streams):
    model = fuse(load(middling, dtype=torch.bfloat16, r=16), policy)
    batches = [padded([(0, 500)] * 4, 500), padded([(0, 300), (20, 300)], 300)]
    for _ in range(2):  # past the first step, where weights begin to stay dequantised
        gradients(model, batches[0])
        model.zero_grad()
    alone, asked = [slopes(model, batch) for batch in batches], answer(model, batches[1])
    torch.cuda.synchronize()

    def in_a_stream(work):
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()

        def task():
            with torch.cuda.stream(stream):
                work()

        return task

    def train(batch, expected):
        def work():
            for ours, theirs in zip(slopes(model, batch), expected, strict=True):
                assert (ours - theirs).norm() <= 0.1 * theirs.norm()

        return work

    def ask():
        assert (answer(model, batches[1]) - asked).norm() <= 0.05 * asked.norm()

    tasks = [train(*pair) for pair in zip(batches, alone, strict=True)]
    together(*(in_a_stream(work) for work in [*tasks, ask, ask]), rounds=10)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [*LADDER, "auto"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_weights_on_the_host_change_no_bit(middling, quant, policy, dtype):
    """The device lags behind: a copy that does not wait for its event would overwrite what is still to be read."""
    model = load(middling, quant, dtype=dtype, r=16)
    batches = [padded([(0, 100)] * 2, 100), padded([(0, 60), (20, 60)], 60)]

    def work():
        torch.cuda._sleep(200_000_000)
        model.zero_grad()
        found = [answer(model, batches[1])]
        for batch in batches:
            model(**batch).loss.backward()
            found.append(answer(model, batches[0]))
        return found + [part.grad.clone() for part in adapters(model)]

    fuse(model, policy)
    resident = [work() for _ in range(3)]
    fuse(model, policy, weights="host")
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    model.to("cuda")
    assert weight.device.type == "cpu"
    assert weight.data.is_pinned()
    for expected in resident:
        for ours, theirs in zip(work(), expected, strict=True):
            assert torch.equal(ours, theirs)
    unfuse(model)
    assert weight.device.type == "cuda"


def requested():
    """Bytes of all tensors on the device, without what the allocator rounds up: up to 1 MB each."""
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def test_the_memory_of_weights_on_the_host_is_that_of_two_layers(middling):
    model = load(middling, dtype=torch.bfloat16, r=16)
    shape = ModelShape.from_config(model.config.to_dict())
    before = requested()
    fuse(model, "host", weights="host")
    layer, buffers = streamed_layer_bytes(shape, "nf4", True, 2), streamed_bytes(shape, "nf4", True, 2)
    freed = before - requested()
    print(freed, 6 * layer - buffers)
    assert freed == pytest.approx(6 * layer - buffers, rel=0.01)
    gradients(model, padded([(0, 100)], 100))
    model.zero_grad()
    unfuse(model)
    assert requested() == pytest.approx(before, rel=0.2)


@pytest.mark.parametrize("resident", [1, 3, 5])
def test_resident_layers_change_no_bit(middling, resident):
    model, batch = load(middling, dtype=torch.bfloat16, r=16), padded([(0, 100)] * 2, 100)
    expected = gradients(fuse(model, "drop-qkv"), batch)
    weights = [layer.mlp.up_proj.base_layer.weight for layer in model.get_base_model().model.layers]
    fuse(model, "drop-qkv", weights="host", resident_layers=resident)
    assert sum(weight.device.type == "cuda" for weight in weights) == resident
    for _ in range(2):
        assert_same(gradients(model, batch), expected, 1e-12)


@pytest.mark.parametrize("embedding", ["device", "host"])
def test_a_model_on_the_host_is_fused_without_its_weights_ever_being_on_the_device(middling, embedding):
    batch = padded([(0, 100)] * 2, 100)
    model = load(middling, device="cpu", dtype=torch.bfloat16, r=16)
    shape = ModelShape.from_config(model.config.to_dict())
    before = requested()
    torch.cuda.reset_peak_memory_stats()
    fuse(model, "layer-input", embedding=embedding, weights="host")
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    others = [part for part in model.parameters() if part.device.type == "cuda"]
    planned = streamed_bytes(shape, "nf4", True, 2) + sum(part.nbytes for part in others)
    print(taken, planned)
    assert taken == pytest.approx(planned, rel=0.02)
    assert model.device.type == "cuda"
    streamed = gradients(model, batch)
    unfuse(model)
    assert {part.device.type for part in model.parameters()} == {"cuda"}
    fuse(model, "layer-input")
    assert_same(streamed, gradients(model, batch), 1e-12)


def test_a_model_that_was_fused_on_the_host_moves_to_the_device_with_its_embedding(middling):
    model, batch = load(middling, device="cpu", dtype=torch.bfloat16, r=16), padded([(0, 100)] * 2, 100)
    fuse(model, embedding="host")
    fuse(model, "layer-input", weights="host")
    assert model.get_input_embeddings().weight.device.type == "cuda"
    assert gradients(model, batch)[0] > 0


def test_a_model_on_the_host_that_cannot_be_fused_stays_there(middling):
    model = load(middling, device="cpu", dtype=torch.bfloat16, r=16)
    model.get_base_model().model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(EngineError, match="layer 2 cannot be") as caught:
        fuse(model, weights="host")
    print(caught.value)
    assert {part.device.type for part in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("streams", [False, True])
def test_threads_with_weights_on_the_host(middling, streams):
    model = fuse(load(middling, dtype=torch.bfloat16, r=16), "drop-qkv", weights="host")
    batch, other = padded([(0, 100)] * 2, 100), padded([(0, 60), (20, 60)], 60)
    expected, asked = slopes(model, batch), answer(model, other)
    torch.cuda.synchronize()

    def task(work):
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()

        def go():
            with torch.cuda.stream(stream):
                work()
                stream.synchronize()

        return go

    def train():
        for ours, theirs in zip(slopes(model, batch), expected, strict=True):
            assert torch.equal(ours, theirs)

    def ask():
        assert torch.equal(answer(model, other), asked)

    together(task(train), task(train), task(ask), rounds=10)


def test_samples_with_embedding_and_weights_on_the_host(middling):
    model = load(middling, dtype=torch.bfloat16, r=16).eval()
    ids = [5, 6, 7, 8]
    logits = answer(model, {"input_ids": torch.tensor([ids], device="cuda")})[0, -1].float()
    fuse(model, embedding="host", weights="host")
    with KeptGenerator(model, 0).using([]) as generator:
        assert isinstance(generator, Padded)
        (found,) = complete(generator, [Request(ids, 8, "default", frozenset())])
    assert len(found.ids) == 8
    assert logits[found.ids[0]] >= logits.max() - 0.05 * logits.std(), "the likeliest token, up to rounding"


@pytest.mark.parametrize("policy", [*LADDER, "auto"])
def test_backward_twice_on_a_gpu(middling, policy):
    """Under `host` the inputs come back twice, and the buffers they lie in are free only then."""
    model, batch = fuse(load(middling, dtype=torch.bfloat16, r=16), policy), padded([(0, 300), (20, 280)], 300)
    for _ in range(2):
        loss = model(**batch).loss
        first = torch.autograd.grad(loss, adapters(model), retain_graph=True)
        other = slopes(model, {**batch, "input_ids": batch["input_ids"].flip(1)})  # buffers that are free are used
        second = torch.autograd.grad(loss, adapters(model))
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()
        for ours, theirs, elsewhere in zip(second, first, other, strict=True):
            assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
            assert (elsewhere - theirs).norm() > 0.2 * theirs.norm()
