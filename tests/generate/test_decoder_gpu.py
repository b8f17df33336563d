"""The decoder's CUDA step against the plain path of bitsandbytes and PEFT, on the shapes that models have and on odd ones."""

from __future__ import annotations

import contextlib
import dataclasses

import bitsandbytes
import pytest
import torch
from peft import PeftModel

from bench.quantised_llama import ALL, Shape, prefix_cache, quantised_llama, with_adapters

pytestmark = pytest.mark.gpu
SHAPES = {
    "llama 2 7B": Shape(4096, 32, 32, 128, 11008),
    "llama 3 8B": Shape(4096, 32, 8, 128, 14336),
    "tinyllama": Shape(2048, 32, 4, 64, 5632),
    "smollm2": Shape(576, 9, 3, 64, 1536),
    "odd blocks": Shape(320, 5, 5, 64, 448),
    "head 96": Shape(768, 8, 2, 96, 2112),
    "head 256": Shape(512, 2, 1, 256, 704),
    "seven to one": Shape(896, 14, 2, 64, 4864),
    "70B's width": Shape(1024, 8, 1, 128, 28672, layers=1),
}
ADAPTERS = {"one": (16, ALL), "two": (5, ["q_proj", "v_proj"]), "three": (256, ["o_proj", "up_proj", "down_proj"])}


@contextlib.contextmanager
def answering(model, adapter):
    if not isinstance(model, PeftModel):
        yield
    elif adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter, inference_mode=True)
        yield


def step_of(model, rows, lengths, adapters):
    """A step after prompts of these lengths, its input, and the plain path's logits of the same token."""
    from nybble.generate.decoder.cuda_step import CudaStep, StepInput, pack_model
    from nybble.generate.decoder.model import read_model
    from nybble.kernels.cuda.buffers import SharedBuffers
    from nybble.kernels.cuda.kernels import Kernels

    read = read_model(model)
    packed = pack_model(read)
    most = max(lengths) // 64 + 1
    cache = torch.zeros(
        len(read.layers), 2, rows * most, read.kv_heads, 64, read.head_size, device="cuda", dtype=torch.bfloat16
    )
    order = torch.randperm(rows * most, generator=torch.Generator().manual_seed(1)).view(rows, most)
    names = list(read.adapters)
    wanted = []
    torch.manual_seed(2)
    tokens = torch.randint(0, read.vocabulary, (rows, max(lengths) + 1), device="cuda")
    for row, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
        with answering(model, adapter), torch.inference_mode():
            past = prefix_cache(model, tokens[row : row + 1, :length])
            for index, layer in enumerate(past.layers):
                for which, states in enumerate((layer.keys, layer.values)):
                    padded = torch.nn.functional.pad(states[0], (0, 0, 0, most * 64 - length))
                    pages = padded.unflatten(1, (most, 64)).transpose(0, 1)
                    cache[index, which, order[row].cuda()] = pages
            whole = model(input_ids=tokens[row : row + 1, : length + 1], use_cache=False).logits[0, -1]
            wanted.append(whole.float())
    inputs = StepInput(
        torch.stack([tokens[row, length] for row, length in enumerate(lengths)]),
        torch.tensor(lengths, dtype=torch.int32, device="cuda"), order.int().cuda(),
        torch.tensor([-1 if name is None else names.index(name) for name in adapters], dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    step = CudaStep(
        packed, Kernels(torch.device("cuda"), None), inputs, cache, read.rotary_tables(4096), SharedBuffers(read.device)
    )
    return step, torch.stack(wanted), exact_logits(model, tokens, lengths, adapters)


def exact_logits(model, tokens, lengths, adapters):
    """The same in float32 throughout; the model is left so."""
    model.float()
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    exact = []
    for row, (length, adapter) in enumerate(zip(lengths, adapters, strict=True)):
        with answering(model, adapter), torch.inference_mode():
            exact.append(model(input_ids=tokens[row : row + 1, : length + 1], use_cache=False).logits[0, -1])
    return torch.stack(exact)


def check(logits, plain, exact):
    """As near to exact logits as the plain path is; both round to bf16, at different places."""
    ours, theirs = (1 - torch.cosine_similarity(each.double(), exact.double(), dim=-1) for each in (logits, plain))
    apart = 1 - torch.cosine_similarity(logits.double(), plain.double(), dim=-1)
    print(f"ours {ours.max():.2e}, plain {theirs.max():.2e} from exact; {apart.max():.2e} apart")
    assert ours.max() < 1.1 * theirs.max() + 1e-6
    assert (logits.norm(dim=-1) / exact.norm(dim=-1) - 1).abs().max() < 0.01


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_the_plain_path(name, rows):
    model = with_adapters(quantised_llama(SHAPES[name]), ADAPTERS)
    lengths = [(37 * row) % 300 + 1 for row in range(rows)]
    adapters = [(None, *ADAPTERS)[row % 4] for row in range(rows)]
    step, plain, exact = step_of(model, rows, lengths, adapters)
    with torch.inference_mode():
        logits = step.run().clone()
        again = step.run().clone()
    check(logits, plain, exact)
    assert torch.equal(logits, again)


@pytest.mark.parametrize("nested", [True, False])
def test_scales_may_be_quantised_or_not_and_a_base_may_stand_alone(nested):
    model = quantised_llama(SHAPES["smollm2"], nested=nested)
    step, plain, exact = step_of(model, 5, [1, 63, 64, 65, 1000], [None] * 5)
    with torch.inference_mode():
        check(step.run(), plain, exact)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("name", ["smollm2", "llama 3 8B", "head 96"])
def test_a_base_in_16_bits_answers_with_its_adapters(name, rows):
    model = with_adapters(quantised_llama(SHAPES[name], quantised=False), ADAPTERS)
    adapters = [(None, *ADAPTERS)[row % 4] for row in range(rows)]
    step, plain, exact = step_of(model, rows, [(37 * row) % 300 + 1 for row in range(rows)], adapters)
    with torch.inference_mode():
        check(step.run(), plain, exact)


@pytest.mark.parametrize("rows, length", [(1, 4000), (2, 1500), (20, 700)])
def test_long_caches_are_shared_out_and_merged(rows, length):
    model = with_adapters(quantised_llama(SHAPES["tinyllama"]), {"one": (8, ALL)})
    step, plain, exact = step_of(model, rows, [length - row for row in range(rows)], ["one"] * rows)
    with torch.inference_mode():
        check(step.run(), plain, exact)


def test_idle_rows_change_nothing():
    model = with_adapters(quantised_llama(SHAPES["smollm2"]), {"one": (8, ALL)})
    step, _, _ = step_of(model, 4, [100, 5, 70, 9], ["one"] * 4)
    with torch.inference_mode():
        before = step.run().clone()
        step.inputs.positions[1] = -1
        after = step.run()
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert after[1].isfinite().all()


def request(prompt, adapter, tokens, **options):
    from nybble.generate.request import Request

    return Request(prompt, tokens, adapter, frozenset(), **options)


@pytest.fixture(scope="module")
def answering_model():
    return with_adapters(quantised_llama(SHAPES["smollm2"]), ADAPTERS)


OPTIONS = [
    {}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3, "temperature": 0.7, "min_p": 0.05, "seed": 6}, {"logit_bias": ((7, 3.0),), "logprobs": 3},
]  # fmt: skip


def random_requests(seed, count, tokens, options):
    torch.manual_seed(seed)
    return [
        request(torch.randint(3, 500, (70,)).tolist(), (None, *ADAPTERS)[n % 4], tokens, **options[n % len(options)])
        for n in range(count)
    ]


def test_an_answer_does_not_depend_on_who_its_neighbours_are(answering_model):
    """In a batch of as many rows every bit is the same, so every answer is, whatever its options."""
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    mine, others = random_requests(4, 24, 40, OPTIONS), [random_requests(seed, 24, 40, OPTIONS) for seed in (5, 6)]
    with torch.inference_mode():
        # A decoder each: beginnings that the first has in its cache would be computed otherwise by the second.
        first, second = (complete(make_decoder(answering_model), [*mine, *them])[:24] for them in others)
    assert [answer.ids for answer in first] == [answer.ids for answer in second]
    assert {len(answer.ids) for answer in first} == {40}


def test_an_answer_parts_from_the_same_one_alone_only_at_near_ties(answering_model):
    """In a batch of another size K is cut elsewhere, so sums are rounded otherwise."""
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    requests = random_requests(7, 90, 40, [{"logprobs": 2}])  # more than rows at once
    with torch.inference_mode():
        generator = make_decoder(answering_model)
        together = complete(generator, requests)
        alone = [complete(generator, [each])[0] for each in requests]
    assert parted_at_near_ties(together, alone) < 30


def parted_at_near_ties(ones, others):
    """How many answers differ; each from a token on whose likelihood was almost that of the second."""
    parted = 0
    for one, other in zip(ones, others, strict=True):
        assert len(one.tokens) == len(other.tokens) > 0
        for mine, theirs in zip(one.tokens, other.tokens, strict=True):
            if mine.id != theirs.id:
                gaps = [token.top[0][1] - token.top[1][1] for token in (mine, theirs)]
                print(f"parted at gaps of {gaps}")
                assert max(gaps) < 0.05, "in nats"
                parted += 1
                break
    return parted


def test_prompt_parts_and_shared_beginnings_change_an_answer_only_at_near_ties(answering_model):
    """The last part of a prompt is short enough for the steps' kernels, which round otherwise."""
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    torch.manual_seed(5)
    prompts = [torch.randint(3, 500, (700,)).tolist() for _ in range(24)]
    requests = [request(prompt, "one", 24, logprobs=2) for prompt in prompts]
    with torch.inference_mode():
        whole = complete(make_decoder(answering_model), requests)
        generator = make_decoder(answering_model)
        generator.steps.chunk = 150
        parts = complete(generator, requests)
        again = complete(generator, requests)
    assert parted_at_near_ties(parts, whole) < 12
    assert parted_at_near_ties(again, whole) < 12


def test_a_prompts_log_probabilities_are_those_of_the_plain_path(answering_model):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    torch.manual_seed(6)
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (5, 300)]
    requests = [request(prompt, name, 1, prompt_logprobs=1) for prompt in prompts for name in (None, *ADAPTERS)]
    with torch.inference_mode():
        generator = make_decoder(answering_model)
        generator.steps.chunk = 150
        for asked, answer in zip(requests, complete(generator, requests), strict=True):
            with answering(answering_model, asked.adapter):
                logits = answering_model(torch.tensor([asked.prompt], device="cuda")).logits[0, :-1].float()
            ids = torch.tensor(asked.prompt[1:], device="cuda").unsqueeze(1)
            expected = logits.log_softmax(-1).gather(1, ids).squeeze(1)
            found = torch.tensor([token.logprob for token in answer.prompt[1:]], device="cuda")
            difference = (found - expected).abs().mean().item()
            print(f"{len(asked.prompt)} tokens, {asked.adapter}: {difference:.4f} nats on average")
            assert difference < 0.05
            assert len(answer.ids) == 1


def test_rows_that_follow_a_grammar_answer_beside_free_ones(answering_model):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete
    from tests.generate.test_constraint import STOP, Ascending

    requests = [
        dataclasses.replace(each, grammar="10" if n % 3 == 0 else None, stop_ids=frozenset({STOP}))
        for n, each in enumerate(random_requests(8, 24, 12, OPTIONS))
    ]
    with torch.inference_mode():
        answers = complete(make_decoder(answering_model, constrain=Ascending), requests)
    for answer in answers[::3]:
        own = [token for token in answer.ids if token != STOP]
        assert own == sorted(set(own))
        assert 10 < own[0] <= 34


@pytest.mark.parametrize("name", ["smollm2", "llama 2 7B", "head 256"])
def test_tokens_of_one_sequence_see_those_before_them(name):
    from nybble.generate.decoder.cuda_steps import CudaSteps
    from nybble.generate.decoder.model import read_model

    model = with_adapters(quantised_llama(SHAPES[name]), ADAPTERS)
    torch.manual_seed(6)
    prompts, adapters = [torch.randint(3, 500, (length,)).tolist() for length in (60, 9, 200)], ["one", None, "three"]
    parts = [torch.randint(3, 500, (count,)).tolist() for count in (8, 1, 4)]
    with torch.inference_mode():
        steps = CudaSteps(read_model(model), 4096, None)
        slots = [steps.reserve(prompt, adapter, 256) for prompt, adapter in zip(prompts, adapters, strict=True)]
        steps.prefill(slots, prompts)
        together = steps.verify(slots, parts).clone()
        assert [slot.length for slot in slots] == [60, 9, 200]
        assert torch.equal(steps.verify(slots, parts), together)
        row = 0
        for slot, part in zip(slots, parts, strict=True):
            for token in part:
                one = steps.decode([slot], torch.tensor([token], device="cuda"))[0]
                apart = 1 - torch.cosine_similarity(together[row].double(), one.double(), dim=0)
                assert apart < 1e-4, (row, float(apart))
                row += 1


def test_short_prompts_through_the_steps_kernels_are_those_of_the_plain_pass(answering_model, monkeypatch):
    from nybble.generate.decoder import cuda_steps
    from nybble.generate.decoder.model import read_model

    torch.manual_seed(9)
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (1, 64, 65, 20, 30)]
    adapters = [None, *ADAPTERS, "one"]

    def first_logits(short):
        monkeypatch.setattr(cuda_steps, "SHORT", short)
        steps = cuda_steps.CudaSteps(read_model(answering_model), 4096, None)
        slots = [steps.reserve(prompt, adapter, 200) for prompt, adapter in zip(prompts, adapters, strict=True)]
        logits = steps.prefill(slots, prompts)
        assert [slot.length for slot in slots] == [len(prompt) for prompt in prompts]
        following = steps.decode(slots, torch.arange(5, 10, device="cuda"))
        return torch.cat([logits, following]).double()

    with torch.inference_mode():
        mine, plain = first_logits(192), first_logits(0)
    assert (1 - torch.cosine_similarity(mine, plain, dim=-1)).max() < 3e-4


@pytest.mark.parametrize("name", ["smollm2", "llama 2 7B", "llama 3 8B", "head 96", "head 256"])
def test_a_cache_in_fp8_rounds_as_torch_does(name):
    """Each step against the plain pass, which attends in torch to what was stored."""
    from nybble.generate.decoder.cuda_steps import CudaSteps
    from nybble.generate.decoder.model import read_model

    model = with_adapters(quantised_llama(SHAPES[name]), {"one": (8, ALL)})
    torch.manual_seed(10)
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (300, 5, 130)]
    with torch.inference_mode():
        steps = CudaSteps(read_model(model), 4096, None, torch.float8_e4m3fn)
        slots = [steps.reserve(prompt, "one", 400) for prompt in prompts]
        steps.prefill(slots, prompts)
        token = torch.tensor([7, 8, 9], device="cuda")
        decoded = steps.decode(slots, token).clone()
        together = steps.verify(slots, [[4, 5]] * 3)[1::2].clone()
        others = [steps.reserve([*prompt, 7 + n], "one", 400) for n, prompt in enumerate(prompts)]
        for slot in others:
            slot.length = 0
        plain = steps.prefill(others, [[*prompt, 7 + n] for n, prompt in enumerate(prompts)])
        third = [[*prompt, 7 + n, 4, 5] for n, prompt in enumerate(prompts)]
        for slot in others:
            slot.length = 0
        plain_together = steps.prefill(others, third)
    assert steps._cache.dtype == torch.float8_e4m3fn
    for mine, expected in ((decoded, plain), (together, plain_together)):
        apart = 1 - torch.cosine_similarity(mine.double(), expected.double(), dim=-1)
        assert apart.max() < 3e-3, apart


def test_a_cache_for_one_request_has_room_for_it(answering_model):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    with torch.inference_mode():
        generator = make_decoder(answering_model, tokens=100, longest=100)
        (answer,) = complete(generator, [request([*range(5, 41)], "one", 64)])
    assert len(answer.ids) == 64


def test_a_short_prompt_does_not_take_the_long_way(answering_model, monkeypatch):
    from nybble.generate.decoder import cuda_steps
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    def refuse(*given):
        raise AssertionError("a pass in plain torch")

    with torch.inference_mode():
        generator = make_decoder(answering_model)
        monkeypatch.setattr(cuda_steps, "PromptPass", refuse)
        (answer,) = complete(generator, [request([*range(5, 105)], "one", 4)])
    assert len(answer.ids) == 4


def test_drafts_change_no_answer(answering_model):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    torch.manual_seed(8)
    passage = torch.randint(3, 500, (40,)).tolist()
    with torch.inference_mode():
        speculating, plain = make_decoder(answering_model), make_decoder(answering_model)
        plain.speculates = False
        verified, verify = [], speculating.steps.verify
        speculating.steps.verify = lambda slots, parts: verified.append(parts) or verify(slots, parts)
        parted = 0
        for adapter in (None, *ADAPTERS):
            batch = [request([*passage, *passage[: 20 + n]], adapter, 60, logprobs=2) for n in range(2)]
            for mine, theirs in zip(complete(speculating, batch), complete(plain, batch), strict=True):
                for one, other in zip(mine.tokens, theirs.tokens, strict=True):
                    if one.id != other.id:
                        assert max(token.top[0][1] - token.top[1][1] for token in (one, other)) < 0.05, "in nats"
                        parted += 1
                        break
    assert verified, "nothing was drafted"
    assert parted < 6


def test_a_graph_that_cannot_be_captured_is_launched_kernel_by_kernel_and_the_log_says_so(
    answering_model, monkeypatch, caplog
):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.generate.request import complete

    requests = [request([5, 6, 7], "one", 12), request([9, 8], None, 12)]
    with torch.inference_mode():
        expected = [answer.ids for answer in complete(make_decoder(answering_model), requests)]

        def refuse(graph, pool):
            raise RuntimeError("capture is not possible")

        monkeypatch.setattr(torch.cuda, "graph", refuse)
        found = [answer.ids for answer in complete(make_decoder(answering_model), requests)]
    print(caplog.text)
    assert (
        "the step of 2 rows cannot be captured in a CUDA graph and will be slower: capture is not possible"
        in caplog.text
    )
    assert found == expected


def test_kernels_that_do_not_compile_are_a_reason_to_answer_otherwise(answering_model, monkeypatch):
    from nybble.generate.decoder.choice import make_decoder
    from nybble.kernels.cuda import kernels
    from nybble.kernels.cuda.compile import CompileError
    from nybble.weights.watched import Ineligible

    def refuse(*given):
        raise CompileError("product.cu does not compile for sm_90: no")

    monkeypatch.setattr(kernels, "cubin", refuse)
    with pytest.raises(Ineligible, match=r"product\.cu does not compile"):
        make_decoder(answering_model)


def test_a_graph_replays_the_step():
    model = with_adapters(quantised_llama(SHAPES["llama 2 7B"]), {"one": (16, ALL)})
    step, _, _ = step_of(model, 2, [200, 77], ["one"] * 2)
    with torch.inference_mode():
        eager = step.run().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
        step.logits.zero_()
        graph.replay()
    assert torch.equal(step.logits, eager)
