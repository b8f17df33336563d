"""Padded batches: adapters side by side, the seed contract, and what one failing batch takes along."""

from __future__ import annotations

import collections
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from nybble.generate.padded import Padded
from nybble.generate.request import GenerationError, Request, complete
from nybble.generate.worker import Worker

PROMPTS = [[1, 40, 50, 60], [1, 40, 50], [1, 40, 50, 60, 70, 80, 90], [5, 6], [1, 40, 50, 61, 62]]
ADAPTERS = [None, "default", "run2"]
CLOSE = 1e-4  # nats; float32 of one row and of a batch differ by 1e-5


def adapted(folder, **options):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**config | options))
    model.add_adapter("run2", LoraConfig(**config | options | {"r": 2, "target_modules": ["k_proj", "up_proj"]}))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model(peaky_llama):
    return adapted(peaky_llama)


@pytest.fixture(scope="module")
def dora(peaky_llama):
    return adapted(peaky_llama, use_dora=True, target_modules=["q_proj", "v_proj"])


def ask(prompt, adapter=None, tokens=12, **more):
    return Request(prompt, tokens, adapter, frozenset(), **more)


def alone(model, prompt, adapter, tokens=12):
    """Greedy token ids as PEFT's own switches give them, one at a time and without a cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(tokens):
            if adapter is None:
                with model.disable_adapter():
                    logits = model(ids).logits
            else:
                model.set_adapter(adapter, inference_mode=True)
                logits = model(ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def batches(monkeypatch, generator):
    """How many rows, and how many adapters, each batch has."""
    seen, compute = [], generator._compute

    def watched(batch):
        seen.append((len(batch.rows), len({row.request.adapter for row in batch.rows})))
        compute(batch)

    monkeypatch.setattr(generator, "_compute", watched)
    return seen


def test_two_adapters_and_the_base_share_a_batch_and_answer_as_alone(model, monkeypatch):
    generator = Padded(model, 0)
    seen = batches(monkeypatch, generator)
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    answers = complete(generator, [ask(*each) for each in asked])
    assert [answer.ids for answer in answers] == [alone(model, *each) for each in asked]
    assert len({tuple(answer.ids) for answer in answers[:3]}) == 3
    assert seen == [(15, 3)]


def test_a_common_prefix_is_computed_once_for_each_adapter(model):
    prefix = [1, *range(100, 140)]
    asked = [([*prefix, *rest], adapter) for rest in ([7], [8, 9], [7, 9, 11]) for adapter in ADAPTERS]
    answers = complete(Padded(model, 0), [ask(*each) for each in asked])
    assert [answer.ids for answer in answers] == [alone(model, *each) for each in asked]


def test_rows_of_one_adapter_that_fill_a_batch_have_it_to_themselves(model, monkeypatch):
    generator = Padded(model, 0, rows=4)
    seen = batches(monkeypatch, generator)
    order = ["default", None, "default", "run2", "default", "default", None]
    answers = complete(generator, [ask(PROMPTS[0], adapter, 3) for adapter in order])
    assert seen == [(4, 1), (3, 2)]
    expected = {adapter: alone(model, PROMPTS[0], adapter, 3) for adapter in ADAPTERS}
    assert [answer.ids for answer in answers] == [expected[adapter] for adapter in order]


def test_where_peft_cannot_mix_adapters_they_take_turns(dora, peaky_llama, monkeypatch):
    copies = adapted(peaky_llama, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    for model in (dora, copies):
        generator = Padded(model, 0)
        seen = batches(monkeypatch, generator)
        asked = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
        answers = complete(generator, [ask(*each) for each in asked])
        assert [answer.ids for answer in answers] == [alone(model, *each) for each in asked]
        assert seen == [(5, 1)] * 3


def test_a_merged_adapter_does_not_mix(peaky_llama):
    model = adapted(peaky_llama)
    model.merge_adapter(["default"])
    assert not Padded(model, 0).scheduler.mixes_adapters
    assert not Padded(model.get_base_model(), 0).scheduler.mixes_adapters


def test_log_probabilities_do_not_depend_on_the_other_rows(model):
    """Whatever stands beside it: other lengths, other adapters, a batch that gives way."""
    asked = [ask(prompt, adapter, logprobs=3) for prompt in PROMPTS for adapter in ADAPTERS]
    single = [complete(Padded(model, 0), [request])[0] for request in asked]
    for options in ({}, {"rows": 2}, {"rows": 7, "patience": 2}):
        together = complete(Padded(model, 0, **options), asked)
        for one, other in zip(single, together, strict=True):
            assert one.ids == other.ids
            assert [token.logprob for token in one.tokens] == pytest.approx(
                [token.logprob for token in other.tokens], abs=CLOSE
            )
            assert all(token.top[0][1] == token.logprob for token in one.tokens)  # greedy: the likeliest


@settings(max_examples=15)
@given(st.integers(-(2**65), 2**65), st.integers(0, 4), st.integers(0, 14), st.sampled_from(ADAPTERS))
def test_a_seeded_answer_does_not_depend_on_the_rest_of_the_batch(model, seed, place, neighbours, adapter):
    sampling = {"temperature": 1.5, "top_k": 40, "top_p": 0.95}
    mine = ask(PROMPTS[place], adapter, seed=seed, **sampling)
    (single,) = complete(Padded(model, 0), [mine])
    others = [ask(PROMPTS[n % 5], ADAPTERS[n % 3], 3 + n, temperature=n / 3) for n in range(neighbours)]
    crowd = complete(Padded(model, 0, rows=6, patience=2), [*others[: place + 1], mine, *others[place + 1 :]])
    assert crowd[min(place + 1, neighbours)].ids == single.ids


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_answer_that_is_continued_from_its_own_beginning_goes_on_the_same(model, adapter):
    generator = Padded(model, 0)
    sampling = {"temperature": 2.0, "seed": 11}
    (whole,) = complete(generator, [ask(PROMPTS[2], adapter, 30, **sampling)])
    for cut in (1, 7, 29):
        (rest,) = complete(generator, [ask([*PROMPTS[2], *whole.ids[:cut]], adapter, 30 - cut, **sampling)])
        assert rest.ids == whole.ids[cut:]


def test_answers_follow_the_models_distribution(model):
    """Chi-square of first tokens over fixed seeds, with every count of five or more in a class of its own."""
    count = 2000
    with torch.no_grad(), model.disable_adapter():
        share = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 4).softmax(-1) * count
    answers = complete(
        Padded(model, 0, rows=250), [ask(PROMPTS[0], None, 1, temperature=4.0, seed=n) for n in range(count)]
    )
    drawn = collections.Counter(answer.ids[0] for answer in answers)
    common = (share >= 5).nonzero().flatten().tolist()
    rare = count - sum(drawn[token] for token in common)
    expected = [float(share[token]) for token in common]
    found = [drawn[token] for token in common]
    if count - sum(expected) > 5:
        expected, found = [*expected, count - sum(expected)], [*found, rare]
    degrees = len(expected) - 1
    chi_square = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    print(chi_square, degrees)
    assert degrees > 5
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_a_batch_that_fails_fails_its_own_requests_only(model, monkeypatch):
    generator = Padded(model, 0, rows=2)
    compute, calls = generator._compute, []

    def failing(batch):
        calls.append(len(batch.rows))
        if len(calls) == 2:
            raise RuntimeError("device-side assert")
        compute(batch)

    monkeypatch.setattr(generator, "_compute", failing)
    with pytest.raises(GenerationError, match="the log says why") as caught:
        complete(generator, [ask(PROMPTS[0])] * 5)
    assert str(caught.value.__cause__) == "device-side assert"
    assert calls == [2, 2, 1]


class Failures:
    """A sink that remembers how its request ended."""

    def __init__(self):
        self.ends = []

    def begin(self, cached, prompt):
        pass

    def put(self, token):
        pass

    def end(self, finish):
        self.ends.append(finish)

    def fail(self, error):
        self.ends.append(str(error))


class BrokenObserver:
    """A defect outside the batch's computation, when a batch has been put together or has ended."""

    def __init__(self, moment):
        self.moment, self.reports = moment, 0

    def batch_started(self, rows):
        assert self.moment != "started"

    def load_changed(self, running, waiting):
        self.reports += 1
        assert self.moment != "gathered" or not running
        assert self.moment != "finished" or self.reports != 3


@pytest.mark.parametrize(
    ("moment", "end"),
    [("gathered", "generation was stopped"), ("started", "generation was stopped"), ("finished", "length")],
)
def test_a_step_that_fails_outside_the_computation_leaves_no_request_without_an_end(model, monkeypatch, moment, end):
    sinks = [Failures(), Failures()]
    generator = Padded(model, 0, observer=BrokenObserver(moment))
    generator.submit([ask(PROMPTS[0], tokens=2)] * 2, sinks)
    with pytest.raises(AssertionError):
        generator.step()
    assert [sink.ends for sink in sinks] == [[end]] * 2
    assert not generator.step()
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    sinks = [Failures(), Failures()]
    worker = Worker(Padded(model, 0, rows=1, observer=BrokenObserver(moment)))
    worker.submit([ask(PROMPTS[0], tokens=2)] * 2, sinks)
    worker.thread.join(60)
    assert not worker.healthy()
    assert [sink.ends for sink in sinks] == [[end], ["cancelled"]]
    with pytest.raises(GenerationError, match="the engine failed"):
        worker.submit([ask(PROMPTS[0])], [Failures()])


def test_a_batch_too_large_for_the_memory_is_halved_and_one_row_too_large_fails(model, monkeypatch):
    generator = Padded(model, 0)
    compute, calls, most = generator._compute, [], 3

    def full(batch):
        calls.append(len(batch.rows))
        if len(batch.rows) > most:
            raise torch.OutOfMemoryError("too much")
        compute(batch)

    monkeypatch.setattr(generator, "_compute", full)
    answers = complete(generator, [ask(PROMPTS[0])] * 8)
    assert {tuple(answer.ids) for answer in answers} == {tuple(alone(model, PROMPTS[0], None))}
    assert calls[:2] == [8, 4]
    assert max(calls[2:]) <= most
    most = 0
    with pytest.raises(GenerationError, match="out of memory: the prompt is too long") as caught:
        complete(generator, [ask(PROMPTS[0])])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("adapters", [["run2", "default"], ["run2", None]])
@pytest.mark.parametrize("prompts", [PROMPTS[:2], PROMPTS[2:4]])
def test_a_mixed_batch_that_raises_midway_leaves_nothing_behind(model, adapters, prompts):
    """Within the model, after some tokens: the halved retry and the next batch are answered by their own adapters."""
    layer, calls = model.get_base_model().model.layers[-1], []

    def full(*_):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = layer.register_forward_hook(full)
    generator = Padded(model, 0)
    try:
        answers = complete(generator, [ask(*pair) for pair in zip(prompts, adapters, strict=True)])
    finally:
        handle.remove()
    assert len(calls) > 3
    assert [answer.ids for answer in answers] == [alone(model, *pair) for pair in zip(prompts, adapters, strict=True)]
    for answer, prompt in zip(
        complete(generator, [ask(prompt, "default") for prompt in prompts]), prompts, strict=True
    ):
        assert answer.ids == alone(model, prompt, "default")


def test_logits_that_are_not_finite_fail_their_row_only(model, monkeypatch):
    forward = model.get_base_model().forward

    def overflowing(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[0] = torch.nan
        return output

    monkeypatch.setattr(model.get_base_model(), "forward", overflowing)
    ended = []

    class Sink:
        def begin(self, cached, prompt):
            pass

        def put(self, token):
            pass

        def end(self, finish):
            ended.append(finish)

        def fail(self, error):
            ended.append(str(error))

    generator = Padded(model, 0)
    generator.submit([ask(PROMPTS[0]), ask(PROMPTS[1], temperature=1.0)], [Sink(), Sink()])
    assert not generator.step()
    assert "infinite or NaN" in ended[0]
    assert ended[1] == "length"


def test_the_observer_hears_of_batches_and_of_load(model):
    told = []

    class Observer:
        def batch_started(self, rows):
            told.append(rows)

        def load_changed(self, running, waiting):
            told.append((running, waiting))

    complete(Padded(model, 0, rows=2, observer=Observer()), [ask(PROMPTS[0], tokens=2)] * 3)
    assert [each for each in told if isinstance(each, int)] == [2, 1]
    assert told[0] == (0, 3)
    assert (2, 1) in told
    assert told[-1] == (0, 0)


def test_requests_may_be_submitted_from_many_threads(model):
    generator, ended = Padded(model, 0, rows=4, patience=1), []

    class Sink:
        def begin(self, cached, prompt):
            pass

        def put(self, token):
            pass

        def end(self, finish):
            ended.append(finish)

        def fail(self, error):
            ended.append(error)

    threads = [
        threading.Thread(target=lambda: [generator.submit([ask(PROMPTS[n])], [Sink()]) for n in range(5)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or generator.step():
        generator.step()
    assert ended == ["length"] * 40
