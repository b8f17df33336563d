"""The decoder in plain torch: adapters side by side, beginnings shared, rows that come and go, and what fails alone."""

from __future__ import annotations

import dataclasses
import logging
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import nybble
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.decoder.layers import pack_adapter
from nybble.generate.decoder.model import read_model
from nybble.generate.decoder.plain_steps import PlainSteps
from nybble.generate.decoder.rows import DecodedRow
from nybble.generate.padded import Padded
from nybble.generate.request import GenerationError, NonFiniteLogitsError, complete
from nybble.weights.projections import ActiveAdapter
from nybble.weights.watched import Ineligible
from tests.generate.test_padded import ADAPTERS, CLOSE, PROMPTS, adapted, alone, ask


@pytest.fixture(scope="module")
def model(peaky_llama):
    return adapted(peaky_llama, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])


def decoder(model, tokens=4000, asynchronous=False):
    """With `asynchronous` it is a step ahead of its device, as on a GPU."""
    read = read_model(model)
    generator = RowDecoder(read, PlainSteps(read, tokens))
    generator.steps.asynchronous = asynchronous
    return generator


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_adapters_and_the_base_answer_together_as_alone(model, asynchronous):
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS] * 2  # more than rows at once
    answers = complete(decoder(model, asynchronous=asynchronous), [ask(*each) for each in asked])
    assert [answer.ids for answer in answers] == [alone(model, *each) for each in asked]


def test_seeded_answers_and_log_probabilities_are_those_of_padded_batches(model):
    requests = [
        ask(prompt, adapter, seed=n, temperature=1.5, top_k=40, top_p=0.95, logprobs=2)
        for n, (prompt, adapter) in enumerate([(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS])
    ]
    for ours, theirs in zip(complete(decoder(model), requests), complete(Padded(model, 0), requests), strict=True):
        assert ours.ids == theirs.ids
        mine, other = ([token.logprob for token in answer.tokens] for answer in (ours, theirs))
        assert mine == pytest.approx(other, abs=CLOSE)
        assert [[i for i, _ in token.top] for token in ours.tokens] == [
            [i for i, _ in token.top] for token in theirs.tokens
        ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_row_has_its_own_penalties_whenever_it_joins(model, asynchronous):
    options = [
        {}, {"frequency_penalty": 1.5}, {"presence_penalty": 2.0, "temperature": 0.8, "seed": 3},
        {"repetition_penalty": 1.8, "logit_bias": ((7, 1.0),)}, {"min_p": 0.2, "temperature": 1.5, "seed": 4},
    ]  # fmt: skip
    requests = [ask(PROMPTS[n % 5], ADAPTERS[n % 3], 10, **options[n % 5]) for n in range(20)]  # more than rows at once
    together = complete(decoder(model, asynchronous=asynchronous), requests)
    assert [answer.ids for answer in together] == [complete(Padded(model, 0), [each])[0].ids for each in requests]


def test_the_host_hands_over_a_step_while_the_next_is_computed(model):
    generator = decoder(model, asynchronous=True)
    events, decode = [], generator.steps.decode
    generator.steps.decode = lambda *given: events.append("step") or decode(*given)
    complete(generator, [ask(PROMPTS[0], None, 4)], lambda number, token: events.append("token"))
    assert events == ["step", "token", "step", "token", "step", "token", "token"]


def test_a_stop_token_drops_what_was_computed_beyond_it(model):
    generator = decoder(model, asynchronous=True)
    whole = alone(model, PROMPTS[0], None)
    stop = whole[4]
    length = whole.index(stop) + 1
    requests = [dataclasses.replace(ask(PROMPTS[0]), stop_ids=frozenset({stop})), ask(PROMPTS[1])]
    answers = complete(generator, requests)
    assert [answer.ids for answer in answers] == [whole[:length], alone(model, PROMPTS[1], None)]
    follow = [*PROMPTS[0], *whole[:length], 9, 11]
    (answer,) = complete(generator, [ask(follow)])  # shares what the first left in the cache
    assert answer.ids == alone(model, follow, None)


@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_a_device_that_is_lost_ends_everything_with_one_message(model, during, caplog, capsys, monkeypatch):
    generator = decoder(model)

    def lost(*given):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore about it")

    setattr(generator.steps, during, lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    sinks = [Collected() for _ in range(20)]  # more than rows at once
    generator.submit([ask(PROMPTS[0])] * 20, sinks)
    with caplog.at_level(logging.ERROR, "nybble.generate"):
        assert generator.step() is False
    print(sinks[0].error)
    (record,) = caplog.records
    assert "the device failed and answers nothing any more; restart nybble" in capsys.readouterr().out
    assert record.getMessage().endswith("restart nybble: CUDA error: unspecified launch failure")
    assert len({str(sink.error) for sink in sinks}) == 1
    assert not generator.healthy()
    with pytest.raises(GenerationError, match="the device failed and answers nothing any more"):
        generator.submit([ask(PROMPTS[0])], [Collected()])


REPEATING = [
    [1, *[50, 60, 70, 80] * 6],
    [1, *[90, 91, 92] * 5, 7],
    [1, *range(100, 130), 9, *range(100, 108)],
    [1, 40, 50, 60],
]


def test_an_error_that_leaves_the_device_usable_fails_its_own_rows_only(model, monkeypatch):
    generator = decoder(model)
    decode = generator.steps.decode

    def failing(*given):
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    generator.steps.decode = failing
    with pytest.raises(GenerationError, match="the model failed"):
        complete(generator, [ask(PROMPTS[0])])
    generator.steps.decode = decode
    assert complete(generator, [ask(PROMPTS[0])])[0].ids == alone(model, PROMPTS[0], None)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_an_answer_that_is_cancelled_in_any_phase_ends_and_the_others_do_not(model, data):
    """While it waits, between two parts of its prompt, at its first token, at a later one, or behind drafts."""
    generator = decoder(model, tokens=data.draw(st.sampled_from([60, 4000])), asynchronous=data.draw(st.booleans()))
    generator.steps.chunk = data.draw(st.sampled_from([2, 256]))
    prompts = [data.draw(st.sampled_from([*PROMPTS, REPEATING[0]])) for _ in range(3)]
    sinks = [Collected() for _ in prompts]
    handles = generator.submit([ask(prompt, None, 14) for prompt in prompts], sinks)
    victim, after = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 20))
    more, steps = True, 0
    while more:
        if steps == after:
            handles[victim].cancel()
        more, steps = generator.step(), steps + 1
    for number, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
        whole = alone(model, prompt, None, 14)
        if number == victim and sink.finish == "cancelled":
            assert sink.ids == whole[: len(sink.ids)]
        else:
            assert (sink.finish, sink.ids) == ("length", whole)
    assert generator.steps._used <= generator.steps.tokens
    assert len(generator._entries) == generator.steps.rows


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_from_the_prompt_change_no_answer(model, asynchronous, rows):
    options = [{}, {"temperature": 0.9, "seed": 3}, {"logprobs": 2}, {"frequency_penalty": 0.5}]
    requests = [ask(REPEATING[n % 4], ADAPTERS[n % 3], 40, **options[n % 4]) for n in range(8)]
    speculating, plain = decoder(model, asynchronous=asynchronous), decoder(model)
    plain.speculates = False
    verified, verify = [], speculating.steps.verify
    speculating.steps.verify = lambda slots, parts: verified.append([*map(len, parts)]) or verify(slots, parts)
    for first in range(0, 8, rows):
        batch = requests[first : first + rows]
        found, expected = complete(speculating, batch), complete(plain, batch)
        assert [answer.ids for answer in found] == [answer.ids for answer in expected]
        for mine, theirs in zip(found, expected, strict=True):
            probabilities = ([token.logprob for token in answer.tokens] for answer in (mine, theirs))
            assert next(probabilities) == pytest.approx(next(probabilities), abs=CLOSE)
    assert verified, "nothing was drafted"
    assert max(map(sum, verified)) <= 8


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_drafted_the_answer_is_the_models(model, data):
    """Right, wrong and partly right drafts of any length, until the last token and beyond a stop."""
    whole = {adapter: alone(model, PROMPTS[0], adapter, 16) for adapter in ADAPTERS}
    generator = decoder(model, asynchronous=data.draw(st.booleans()))

    def draft(row, most):
        if most <= 0:
            return []
        done, right = len(row.active.answer_ids), whole[row.active.request.adapter]
        length = data.draw(st.integers(0, most))
        wrong = data.draw(st.integers(0, length))
        return [*right[done : done + wrong], *[data.draw(st.integers(3, 390)) for _ in range(length - wrong)]][:length]

    adapters = data.draw(st.lists(st.sampled_from(ADAPTERS), min_size=1, max_size=2))
    stop = data.draw(st.sampled_from(whole[adapters[0]]))
    requests = [
        dataclasses.replace(ask(PROMPTS[0], adapter, 16), stop_ids=frozenset({stop} if n == 0 else ()))
        for n, adapter in enumerate(adapters)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodedRow, "draft", lambda row, most: draft(row, min(most, row.active.tokens_left - 1)))
        answers = complete(generator, requests)
    first = whole[adapters[0]]
    assert answers[0].ids == first[: first.index(stop) + 1]
    assert [answer.ids for answer in answers[1:]] == [whole[adapter] for adapter in adapters[1:]]
    follow = [*PROMPTS[0], *first[: first.index(stop) + 1], 9, 11]
    (after,) = complete(generator, [ask(follow, adapters[0], 6)])
    assert after.ids == alone(model, follow, adapters[0], 6), "what drafts left in the cache was shared"


def test_a_long_prompt_is_computed_in_parts_between_the_others_tokens(model, monkeypatch):
    generator = decoder(model)
    generator.steps.chunk = 16
    parts, prefill = [], generator.steps.prefill
    monkeypatch.setattr(
        generator.steps,
        "prefill",
        lambda slots, chunks, visit=None: parts.append([*map(len, chunks)]) or prefill(slots, chunks, visit),
    )
    long = [1, *range(100, 150)]
    answers = complete(generator, [ask(PROMPTS[0], None, 8), ask(long, "run2", 4)])
    assert [answer.ids for answer in answers] == [alone(model, PROMPTS[0], None, 8), alone(model, long, "run2", 4)]
    assert [part for part in parts if part != [1]][:2] == [[4, 12], [16]]
    assert max(map(sum, parts)) <= 16


def test_beginnings_are_computed_once_for_each_adapter(model, monkeypatch):
    generator = decoder(model)
    computed, prefill = [], generator.steps.prefill
    monkeypatch.setattr(
        generator.steps,
        "prefill",
        lambda slots, chunks, visit=None: computed.extend(map(len, chunks)) or prefill(slots, chunks, visit),
    )
    prefix = [1, *range(100, 140)]
    for adapter in ADAPTERS:
        (first,) = complete(generator, [ask([*prefix, 7], adapter, 4)])
        whole = [*prefix, 7, *first.ids, 9, 11]
        computed.clear()
        (second,) = complete(generator, [ask(whole, adapter, 4)])
        assert second.ids == alone(model, whole, adapter, 4)
        assert computed[0] == 3, "the last token of the answer, and the two that are new"


def test_where_the_cache_is_full_the_oldest_wait_and_nothing_is_lost(model):
    generator = decoder(model, tokens=40)
    answers = complete(generator, [ask(prompt, None, 12) for prompt in PROMPTS * 4])
    assert [answer.ids for answer in answers] == [alone(model, prompt, None) for prompt in PROMPTS * 4]


def test_a_request_beyond_the_whole_cache_is_refused_before_it_starts(model, capsys):
    generator = decoder(model, tokens=40)
    with pytest.raises(GenerationError) as refused:
        generator.submit([ask(PROMPTS[0], None, 37)], [None])
    print(refused.value)
    assert "needs 41 tokens (prompt 4, answer up to 37), and there is memory for 40" in capsys.readouterr().out


def test_a_request_beyond_the_context_length_is_refused_before_it_starts(model, capsys):
    with pytest.raises(GenerationError) as refused:
        decoder(model).submit([ask(PROMPTS[0], None, 509)], [None])
    print(refused.value)
    assert (
        "needs 513 tokens (prompt 4, answer up to 509), and the context length of the model is 512"
        in capsys.readouterr().out
    )


def test_a_row_joins_while_others_are_under_way(model):
    generator = decoder(model)
    later = []

    def join(number, token):
        if number == 0 and not later:
            later.append(generator.submit([ask(PROMPTS[2], "default")], [sink])[0])

    sink = Collected()
    (first,) = complete(generator, [ask(PROMPTS[0], None, 30)], join)
    assert first.ids == alone(model, PROMPTS[0], None, 30)
    assert sink.ids == alone(model, PROMPTS[2], "default")
    assert sink.finish == "length"


class Collected:
    """A sink."""

    def __init__(self):
        self.ids, self.finish, self.error = [], None, None

    def begin(self, cached, prompt):
        pass

    def put(self, token):
        self.ids.append(token.id)

    def end(self, finish):
        self.finish = finish

    def fail(self, error):
        self.error = error


def test_a_row_without_finite_logits_fails_alone(model):
    broken = decoder(model)
    prefill = broken.steps.prefill

    def spoil(slots, chunks, visit=None):
        logits = prefill(slots, chunks, visit)
        for row, slot in enumerate(slots):
            if slot.adapter == "run2":
                logits[row, 3] = torch.nan
        return logits

    broken.steps.prefill = spoil
    sinks = [Collected(), Collected()]
    broken.submit([ask(PROMPTS[0]), ask(PROMPTS[0], "run2")], sinks)
    while broken.step():
        pass
    assert sinks[0].ids == alone(model, PROMPTS[0], None)
    assert isinstance(sinks[1].error, NonFiniteLogitsError)
    assert sinks[1].ids == []


def test_prompts_that_do_not_fit_together_are_tried_alone(model):
    generator = decoder(model)
    prefill = generator.steps.prefill

    def limited(slots, chunks, visit=None):
        if sum(map(len, chunks)) > 6:
            raise torch.OutOfMemoryError("no")
        return prefill(slots, chunks, visit)

    generator.steps.prefill = limited
    sinks = [Collected() for _ in range(3)]
    generator.submit([ask(PROMPTS[0]), ask(PROMPTS[2]), ask(PROMPTS[1])], sinks)
    while generator.step():
        pass
    assert "the prompt is too long for this device" in str(sinks[1].error)
    assert isinstance(sinks[1].error.__cause__, torch.OutOfMemoryError)
    assert [sinks[0].ids, sinks[2].ids] == [alone(model, PROMPTS[0], None), alone(model, PROMPTS[1], None)]


def test_a_step_that_fails_ends_its_rows_and_the_next_request_is_answered(model, caplog):
    generator = decoder(model)
    decode = generator.steps.decode

    def failing(slots, ids):
        raise RuntimeError("a kernel failed")

    generator.steps.decode = failing
    with caplog.at_level(logging.ERROR, "nybble.generate"), pytest.raises(GenerationError, match="the model failed"):
        complete(generator, [ask(PROMPTS[0])])
    assert "a kernel failed" in caplog.text
    generator.steps.decode = decode
    (answer,) = complete(generator, [ask(PROMPTS[0])])
    assert answer.ids == alone(model, PROMPTS[0], None)


def test_requests_from_many_threads_are_all_answered(model):
    generator = decoder(model)
    sinks = [Collected() for _ in range(24)]
    threads = [
        threading.Thread(target=generator.submit, args=([ask(PROMPTS[n % 5], ADAPTERS[n % 3], 6)], [sinks[n]]))
        for n in range(24)
    ]
    for thread in threads:
        thread.start()
    with torch.inference_mode():
        while generator.step() or any(thread.is_alive() for thread in threads):
            pass
    expected = [alone(model, PROMPTS[n % 5], ADAPTERS[n % 3], 6) for n in range(24)]
    assert [sink.ids for sink in sinks] == expected


def test_closing_between_two_steps_ends_what_is_under_way(model):
    generator, sink = decoder(model), Collected()
    generator.submit([ask(PROMPTS[0], None, 100)], [sink])
    with torch.inference_mode():
        generator.step()
    generator.close()
    assert sink.finish == "cancelled"
    assert generator.step() is False


def test_closing_during_a_step_ends_its_rows_with_it(model):
    generator = decoder(model)
    sinks = [Collected(), Collected()]
    sinks[1].put = lambda token: generator.close()
    generator.submit([ask(prompt, None, 100) for prompt in PROMPTS[:2]], sinks)
    with torch.inference_mode():
        generator.step()
    assert [sink.finish for sink in sinks] == ["cancelled", "cancelled"]
    assert generator.step() is False


@pytest.mark.parametrize(
    "change, why",
    [
        ({"use_dora": True}, "the LoRA variant Dora"),
        ({"modules_to_save": ["lm_head"]}, "found ModulesToSaveWrapper where Linear was expected (lm_head)"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "(embed_tokens)"),
    ],
)
def test_what_the_decoder_cannot_compute_is_named(peaky_llama, change, why, capsys):
    base = LlamaForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | change))
    with pytest.raises(Ineligible) as refused:
        make_decoder(model)
    print(refused.value)
    assert why in capsys.readouterr().out


def test_a_merged_adapter_and_positions_that_change_with_the_length_are_named(peaky_llama):
    model = adapted(peaky_llama, target_modules=["q_proj"])
    model.merge_adapter(["default"])
    with pytest.raises(Ineligible, match="q_proj has a merged adapter"):
        make_decoder(model)
    dynamic = LlamaForCausalLM.from_pretrained(
        peaky_llama, dtype=torch.float32, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    with pytest.raises(Ineligible, match="of the type dynamic"):
        make_decoder(dynamic)


def test_a_model_in_training_answers_as_it_is(peaky_llama):
    """Gradient checkpointing hooks the embedding, and the engine replaces the layers' forward."""
    base = LlamaForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = complete(make_decoder(model), [ask(PROMPTS[0], "default")])[0].ids
    nybble.fuse(model)
    model.train()
    loss = model(input_ids=torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss
    loss.backward()
    assert complete(make_decoder(model), [ask(PROMPTS[0], "default")])[0].ids == expected
    assert model.training
    assert expected == alone(model.eval(), PROMPTS[0], "default")


def test_a_caller_in_mixed_precision_changes_no_answer(model):
    request = ask(PROMPTS[1], "run2")
    with torch.autocast("cpu", torch.bfloat16):
        (answer,) = complete(decoder(model), [request])
    assert answer.ids == alone(model, PROMPTS[1], "run2")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "scalings, rank, joined", [((2.0, 2.0), 4, True), ((2.0, 0.5), 4, False), ((2.0, 2.0), 40, False)]
)
def test_an_adapter_of_a_group_adds_to_the_outputs_of_its_own_projections(scalings, rank, joined):
    """q and v as in a group of q, k and v: k's outputs stay as they are."""
    torch.manual_seed(0)
    projections = [
        ActiveAdapter(
            torch.nn.Parameter(torch.randn(rank, 6)), torch.nn.Parameter(torch.randn(3, rank)), scaling, 0.0,
            slice(first, first + 3), slice(n * rank, (n + 1) * rank),
        )
        for n, (first, scaling) in enumerate(zip((0, 5), scalings, strict=True))
    ]  # fmt: skip
    packed = pack_adapter(projections, torch.float32)
    assert (len(packed.ups) == 1) is joined
    x, out = torch.randn(2, 6), torch.ones(2, 8)
    expected = torch.ones(2, 8)
    for each in projections:
        expected[:, each.outputs] += each.scaling * x @ each.a.T @ each.b.T
    packed.add(x, out)
    torch.testing.assert_close(out, expected.detach())
    assert out[:, 3:5].eq(1).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_step_of_a_token_computes_what_a_prompt_of_it_would(peaky_llama, dtype, tolerance):
    model = adapted(peaky_llama, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]).to(dtype)
    steps = PlainSteps(read_model(model), 4000)
    prompts, tokens = [[1, 5, 9, 30], [1, 7, 8]], [11, 12]
    both = []
    for _ in range(2):
        slots = [steps.reserve(prompt, name, 20) for prompt, name in zip(prompts, (None, ADAPTERS[0]), strict=True)]
        steps.prefill(slots, prompts)
        both.append(slots)
    by_step = steps.decode(both[0], torch.tensor(tokens)).clone()
    by_prompt = steps.prefill(both[1], [[token] for token in tokens])
    torch.testing.assert_close(by_step, by_prompt, rtol=0, atol=tolerance * float(by_prompt.abs().max()))
    for stepped, prompted in zip(*both, strict=True):
        assert stepped.length == prompted.length
        torch.testing.assert_close(
            stepped.states[..., : stepped.length, :],
            prompted.states[..., : stepped.length, :],
            rtol=0,
            atol=10 * tolerance,
        )
