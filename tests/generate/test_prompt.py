"""What a request learns of its prompt: how much of it was cached, and its own log probabilities."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from nybble.generate import prompt_scores
from nybble.generate.continuous import _check_options
from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.decoder.model import read_model
from nybble.generate.decoder.plain_steps import PlainSteps
from nybble.generate.padded import Padded
from nybble.generate.request import GenerationError, NonFiniteLogitsError, Token, UnsupportedError, complete
from tests.generate.test_padded import ADAPTERS, CLOSE, PROMPTS, adapted, ask

LONG = [1, *range(100, 150)]


@pytest.fixture(scope="module")
def model(peaky_llama):
    return adapted(peaky_llama, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])


def decoder(model, chunk=16):
    read = read_model(model)
    generator = RowDecoder(read, PlainSteps(read, 4000))
    generator.steps.chunk = chunk
    return generator


@pytest.fixture(params=["padded", "decoder"])
def generator(request, model):
    return Padded(model, 0) if request.param == "padded" else decoder(model)


def expected(model, prompt, adapter):
    """Log probabilities of all tokens at each position but the last, as PEFT's own switches give them."""
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        model.set_adapter(adapter, inference_mode=True)
        return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("rows", [prompt_scores.ROWS, 7])
def test_a_prompts_log_probabilities_are_the_models(generator, model, monkeypatch, rows):
    monkeypatch.setattr(prompt_scores, "ROWS", rows)
    asked = [
        (prompt, adapter) for prompt in [*PROMPTS, LONG] for adapter in ADAPTERS
    ] * 2  # the second time some are cached
    requests = [ask(prompt, adapter, 3, prompt_logprobs=n % 3) for n, (prompt, adapter) in enumerate(asked)]
    plain = complete(generator, [ask(*each, 3) for each in asked])
    for answer, request, bare in zip(complete(generator, requests), requests, plain, strict=True):
        logprobs = expected(model, request.prompt, request.adapter)
        assert answer.ids == bare.ids
        assert not bare.prompt
        assert (answer.cached, answer.prompt[0]) == (0, Token(request.prompt[0]))
        assert [token.id for token in answer.prompt] == list(request.prompt)
        own = logprobs.gather(1, torch.tensor(request.prompt[1:]).unsqueeze(1)).squeeze(1).tolist()
        assert [token.logprob for token in answer.prompt[1:]] == pytest.approx(own, abs=CLOSE)
        values, ids = logprobs.topk(max(request.prompt_logprobs, 1))
        for n, token in enumerate(answer.prompt[1:]):
            assert [i for i, _ in token.top] == ids[n, : request.prompt_logprobs].tolist()
            assert [value for _, value in token.top] == pytest.approx(
                values[n, : request.prompt_logprobs].tolist(), abs=CLOSE
            )


def test_an_answer_of_no_tokens_computes_the_prompt_only(generator, model):
    requests = [
        ask(LONG, "run2", 0, prompt_logprobs=1),
        ask(PROMPTS[0], None, 4),
        ask(PROMPTS[1], None, 0),
        ask([5], None, 0),
    ]
    answers = complete(generator, [*requests, dataclasses.replace(requests[3], prompt_logprobs=2)])
    assert [answer.finish for answer in answers] == ["length"] * 5
    assert [len(answer.ids) for answer in answers] == [0, 4, 0, 0, 0]
    assert [len(answer.prompt) for answer in answers] == [len(LONG), 0, 0, 0, 1]
    (whole,) = complete(generator, [ask(LONG, "run2", 2, prompt_logprobs=1)])
    assert [token.logprob for token in whole.prompt[1:]] == pytest.approx(
        [token.logprob for token in answers[0].prompt[1:]], abs=CLOSE
    )
    with pytest.raises(GenerationError, match="max_tokens is -1"):
        complete(generator, [ask(PROMPTS[0], None, -1)])


def test_the_decoder_says_how_much_of_a_prompt_was_cached(model):
    generator = decoder(model)
    (first,) = complete(generator, [ask(LONG, None, 4)])
    assert first.cached == 0
    whole = [*LONG, *first.ids, 9]
    again, other, asked = complete(
        generator, [ask(whole, None, 4), ask(whole, "run2", 4), ask(whole, None, 4, prompt_logprobs=0)]
    )
    assert (again.cached, other.cached, asked.cached) == (len(LONG) + 3, 0, 0)


class Begun:
    """A sink that remembers the order of its calls."""

    def __init__(self):
        self.calls = []

    def begin(self, cached, prompt):
        self.calls.append("begin")

    def put(self, token):
        self.calls.append("put")

    def end(self, finish):
        self.calls.append(finish)

    def fail(self, error):
        self.calls.append(error)


def test_a_sink_is_told_once_also_where_a_batch_gives_way(model):
    generator, sinks = Padded(model, 0, rows=1, patience=2), [Begun(), Begun()]
    generator.submit([ask(PROMPTS[0], None, 9, prompt_logprobs=0), ask(PROMPTS[1], None, 9)], sinks)
    while generator.step():
        pass
    assert [sink.calls for sink in sinks] == [["begin", *["put"] * 9, "length"]] * 2


def test_a_prompt_without_finite_logits_fails_alone(generator, model, monkeypatch):
    score = prompt_scores.score_tokens

    def spoiled(states, logits_of, ids, likeliest):
        return score(states * torch.nan if 7 in ids else states, logits_of, ids, likeliest)

    monkeypatch.setattr("nybble.generate.decoder.part_scores.score_tokens", spoiled)
    monkeypatch.setattr("nybble.generate.padded.score_tokens", spoiled)
    sinks = [Begun(), Begun()]
    generator.submit([ask(prompt, None, 2, prompt_logprobs=1) for prompt in ([1, 7, 8], [1, 5, 8])], sinks)
    while generator.step():
        pass
    assert isinstance(sinks[0].calls[-1], NonFiniteLogitsError)
    assert sinks[0].calls[:-1] == []
    assert sinks[1].calls == ["begin", "put", "put", "length"]


def test_continuous_batching_refuses_both():
    with pytest.raises(UnsupportedError, match="no prompt_logprobs") as refused:
        _check_options(ask([1], prompt_logprobs=0))
    assert refused.value.option == "prompt_logprobs"
    with pytest.raises(UnsupportedError, match="at least one token"):
        _check_options(ask([1], None, 0))


def test_a_model_without_adapters_is_scored_too(peaky_llama):
    model = LlamaForCausalLM.from_pretrained(peaky_llama, dtype=torch.float32).eval()
    (answer,) = complete(Padded(model, 0), [ask(LONG, None, 1, prompt_logprobs=0)])
    with torch.no_grad():
        logprobs = model(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(LONG[1:]).unsqueeze(1)).squeeze(1).tolist()
    assert [token.logprob for token in answer.prompt[1:]] == pytest.approx(own, abs=CLOSE)
