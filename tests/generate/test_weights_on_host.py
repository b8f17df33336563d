"""Answers of a model whose weights are on the host: by padded batches through the fused layers, without a cache."""

from __future__ import annotations

import pytest

from nybble.engine.fuse import attach, fuse, fusion, unfuse
from nybble.engine.fusion import streams_weights
from nybble.generate.adapters import can_mix
from nybble.generate.decoder.choice import make_decoder
from nybble.generate.kept import KeptGenerator
from nybble.generate.padded import Padded
from nybble.generate.request import complete
from nybble.weights.streamed import Streaming
from nybble.weights.watched import Ineligible
from tests.engine.streaming import SynchronousCopier
from tests.generate.test_padded import ADAPTERS, PROMPTS, adapted, alone, ask


@pytest.fixture
def model(peaky_llama):
    return adapted(peaky_llama, target_modules=["q_proj", "v_proj", "down_proj"])


def stream(model, embedding="device"):
    attach(model, "auto", embedding, Streaming(SynchronousCopier()))
    return model


def test_padded_batches_answer_as_one_prompt_at_a_time_does(model):
    expected = {(n, name): alone(model, PROMPTS[n], name) for n in range(len(PROMPTS)) for name in ADAPTERS}
    requests = [ask(PROMPTS[n], name) for n, name in expected]
    generator = Padded(stream(model), 0, rows=4)
    assert [answer.ids for answer in complete(generator, requests)] == list(expected.values())
    assert fusion(model).fused == len(model.get_base_model().model.layers)
    scored = ask(PROMPTS[2], "run2", prompt_logprobs=1)
    (found,) = complete(generator, [scored])
    assert found.ids == expected[2, "run2"]


def test_the_decoder_leaves_them_to_padded_batches(model):
    stream(model)
    with pytest.raises(Ineligible, match="its weights are on the host"):
        make_decoder(model)
    kept = KeptGenerator(model, 0)
    with kept.using([ask(PROMPTS[0])]) as generator:
        assert isinstance(generator, Padded)
    unfuse(model)
    model.get_base_model().model.embed_tokens.to("meta")
    with pytest.raises(Ineligible, match="its embedding is on the host"):
        make_decoder(model)


def test_adapters_take_turns(model):
    assert can_mix(model)
    assert not can_mix(stream(model))


def test_it_says_whether_its_weights_are_streamed(model):
    assert not streams_weights(model)
    fuse(model)
    assert not streams_weights(model)
    stream(model)
    assert streams_weights(model)
