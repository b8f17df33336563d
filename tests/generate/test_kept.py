"""The generator that is kept between answers: what it is, and when it is made anew."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig

from nybble.generate.decoder.decoder import RowDecoder
from nybble.generate.kept import KeptGenerator
from nybble.generate.padded import Padded
from nybble.generate.request import complete
from nybble.plan.free_memory import Memory
from tests.generate.test_padded import PROMPTS, adapted, alone, ask


@pytest.fixture
def model(peaky_llama):
    return adapted(peaky_llama, target_modules=["q_proj", "down_proj"])


def test_it_is_the_decoder_and_stays_while_the_model_does(model):
    kept = KeptGenerator(model, 0)
    first = kept._get([ask(PROMPTS[0])])
    assert isinstance(first, RowDecoder)
    with model.disable_adapter():
        assert kept._get([ask(PROMPTS[1], None, 40)] * 30) is first
    model.set_adapter("run2")
    assert kept._get([ask(PROMPTS[1], "run2")]) is first


@pytest.mark.parametrize("change", ["train", "merge", "replace", "add"])
def test_it_follows_a_model_that_changes(model, change):
    kept = KeptGenerator(model, 0)
    before = [answer.ids for answer in complete(kept._get([]), [ask(PROMPTS[0], "default")])]
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    if change == "train":
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(-30)
    elif change == "replace":
        layer.lora_A["default"].weight = torch.nn.Parameter(-20 * layer.lora_A["default"].weight.detach())
    elif change == "add":
        model.add_adapter("new", LoraConfig(r=4, target_modules=["q_proj"]))
    else:
        model.merge_adapter(["default"])
    request = ask(PROMPTS[0], "default")
    after = [answer.ids for answer in complete(kept._get([request]), [request])]
    if change == "merge":
        assert isinstance(kept._get([request]), Padded)
        assert after == before
    else:
        assert after == [alone(model, PROMPTS[0], "default")]
        assert (after == before) == (change == "add")


def test_a_longer_request_gets_a_larger_cache(model):
    kept = KeptGenerator(model, 0, least_tokens=30)
    first = kept._get([ask(PROMPTS[0], None, 20)])
    assert kept._get([ask(PROMPTS[0], None, 26)]) is first
    second = kept._get([ask(PROMPTS[0], None, 40)])
    assert (first.steps.tokens, second.steps.tokens) == (30, 44)


def test_where_the_decoder_cannot_answer_padded_batches_do_and_the_log_says_why(peaky_llama, caplog):
    model = adapted(peaky_llama, target_modules=["q_proj"], use_dora=True)
    kept = KeptGenerator(model, 0)
    with caplog.at_level(logging.INFO, "nybble.generate"):
        generator = kept._get([ask(PROMPTS[0])] * 3)
        assert isinstance(kept._get([ask(PROMPTS[0])]), Padded)
    assert isinstance(generator, Padded)
    messages = [record.getMessage() for record in caplog.records]
    print(messages)
    assert len(messages) == 1, "only the first time"
    assert messages[0].startswith("answering in padded batches: q_proj has the LoRA variant Dora")


def test_a_large_cache_is_freed_after_its_answers_and_a_small_one_kept(model):
    kept = KeptGenerator(model, 0, least_tokens=100)
    with kept.using([ask(PROMPTS[0])]) as small:
        pass
    with kept.using([ask(PROMPTS[1])]) as again:
        assert again is small
    with kept.using([ask(PROMPTS[0], None, 300)]) as large:
        assert large.steps.tokens == 304
    assert kept._decoder is None
    with pytest.raises(KeyboardInterrupt), kept.using([ask(PROMPTS[0], None, 300)]):
        raise KeyboardInterrupt
    assert kept._decoder is None


def test_where_memory_is_short_padded_batches_answer_what_the_decoder_cannot_hold(model, monkeypatch, caplog):
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, two layers, two heads of 16 numbers in float32
    monkeypatch.setattr(
        "nybble.generate.decoder.choice.host_memory", lambda: Memory(free=int(30.5 * per_token / 0.6), total=10**9)
    )
    kept = KeptGenerator(model, 0)
    with caplog.at_level(logging.INFO, "nybble.generate"), kept.using([ask(PROMPTS[0], None, 40)]) as generator:
        assert isinstance(generator, Padded)
    assert "answering in padded batches: there is memory for 30 tokens in its cache, and 44 are needed" in caplog.text
    with kept.using([ask(PROMPTS[0], None, 20)]) as generator:
        assert isinstance(generator, RowDecoder)
        assert complete(generator, [ask(PROMPTS[0], None, 20)])[0].ids == alone(model, PROMPTS[0], None, 20)
