"""Tokens to text and logits to tokens, against what they mean."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nybble.model.tokenizer.load import load_tokenizer
from nybble.generate.batching import PATIENCE, Batch, Batcher, Row
from nybble.serve.mailbox import Answer, Mailbox, Request, Token
from nybble.serve.metrics import Metrics
from nybble.serve.protocol import CompletionRequest, parse
from nybble.generate.sampling import draw
from nybble.serve.text import TextStream, spelling
from tests.conftest import SHARED, WORDS, small_tokenizer

TOKENIZER = small_tokenizer()
TEXTS = st.lists(st.sampled_from([*"ab \n\t", "🙂", "日", "é", "one ", "two "]), max_size=12).map("".join)


def ids_of(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(stream, ids):
    return [*(stream.push(Token(token_id)) for token_id in ids), stream.end()]


@given(TEXTS)
def test_pieces_make_the_text_and_no_character_is_cut(text):
    parts = pieces(TextStream(TOKENIZER, strip=False), [*ids_of(text), TOKENIZER.eos_token_id])
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert "".join(pieces(TextStream(TOKENIZER, strip=True), ids_of(text))) == text.strip()


@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=3), st.booleans())
def test_a_stop_string_never_shows_wherever_tokens_end(text, stops, strip):
    stream = TextStream(TOKENIZER, stops, strip=strip)
    said = "".join(pieces(stream, ids_of(text)))
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    expected = text[: min(places)[1]] if places else text
    assert said == (expected.strip() if strip else expected)
    assert stream.stopped == bool(places)


@settings(max_examples=200)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_bytes_that_are_no_text_make_some(ids):
    assert "".join(pieces(TextStream(TOKENIZER, strip=False), ids)) == TOKENIZER.backend_tokenizer.decode(ids)


def test_a_character_that_was_not_finished_shows_as_one(tiny_tokenizer):
    (*begun, _) = ids_of("🙂", tiny_tokenizer)
    assert pieces(TextStream(tiny_tokenizer, strip=False), begun)[-1] == "\ufffd"


def test_sentencepiece_keeps_the_space_of_a_word_that_goes_on(tmp_path):
    if not SHARED.exists():
        pytest.skip("needs the real Llama 2 tokenizer files")
    shutil.copytree(SHARED / "llama2-tokenizer", tmp_path / "llama2")
    tokenizer = load_tokenizer(tmp_path / "llama2")
    prompt, more = ids_of("Once upon", tokenizer), ids_of("a time 🙂 there", tokenizer)
    assert "".join(pieces(TextStream(tokenizer, (), prompt, strip=False), more)) == " a time 🙂 there"
    assert "".join(pieces(TextStream(tokenizer, strip=False), more)) == "a time 🙂 there"
    for text in ("a time 🙂 there", "日本 <0x41> ▁"):
        raw = b"".join(bytes(spelling(tokenizer, token_id)[1]) for token_id in ids_of(text, tokenizer))
        assert raw.decode().removeprefix(" ").replace(" ", "") == text.replace("▁", " ").replace(" ", "")


def test_a_token_is_spelt_in_bytes(tiny_tokenizer):
    text = f"{' '.join(WORDS)} 🙂 é\n"
    spelt = [spelling(tiny_tokenizer, token_id) for token_id in ids_of(text, tiny_tokenizer)]
    assert b"".join(bytes(raw) for _, raw in spelt).decode() == text
    assert spelling(tiny_tokenizer, tiny_tokenizer.eos_token_id) == ("</s>", tuple(b"</s>"))
    assert spelling(tiny_tokenizer, 10**6) == ("", ())


def rows(count=1, **sampling):
    request = Request("m", [1], 8, **sampling)
    return [Row(request, None, frozenset(), random.Random(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.4, "top_p": 0.7},
     {"temperature": 1.1, "top_k": 8, "top_p": 0.8}],
)  # fmt: skip
def test_draws_follow_the_distribution_that_transformers_filters_make(sampling):
    torch.manual_seed(1)
    logits = torch.randn(1, 20) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling["temperature"])])
    warpers += [TopKLogitsWarper(sampling["top_k"])] if "top_k" in sampling else []
    warpers += [TopPLogitsWarper(sampling["top_p"])] if "top_p" in sampling else []
    expected = warpers(None, logits.clone()).softmax(-1)[0]
    count = 20_000
    drawn = collections.Counter(draw(logits.expand(count, -1), rows(count, **sampling)).tolist())
    for token, share in enumerate(expected.tolist()):
        assert drawn[token] / count == pytest.approx(share, abs=0.012), token
        assert share > 0 or drawn[token] == 0


def test_a_batch_leaves_behind_the_rows_that_have_ended():
    async def work():
        box = Mailbox()
        rows = [Row(Request("m", [1], most), Answer(box), frozenset(), random.Random()) for most in (2, 3, 99)]
        batch = Batch("m", rows, lambda: False, lambda rows: 0)
        for _ in range(PATIENCE - 1):
            done = batch.step([Token(5)] * 3)
        assert done == [True, True, False]
        assert batch.step([Token(5)] * 3) == [True] * 3
        assert batch.unfinished() == [rows[2]]
        alone = Batch("m", batch.unfinished(), lambda: False, lambda rows: 0)
        assert [alone.step([Token(5)]) for _ in range(PATIENCE + 1)][-1] == [False]

    asyncio.run(work())


@pytest.mark.parametrize("running, joiners, tokens", [(1, 15, 1), (4, 4, 8), (15, 1, 15), (8, 0, 16)])
def test_a_batch_gives_way_the_sooner_the_more_could_join_it(running, joiners, tokens):
    async def work():
        box = Mailbox()
        rows = [Row(Request("m", [1], 99), Answer(box), frozenset(), random.Random()) for _ in range(running)]
        batch = Batch("m", rows, lambda: True, lambda rows: joiners)
        for _ in range(tokens - 1):
            assert not any(batch.step([Token(5)] * running))
        assert all(batch.step([Token(5)] * running))

    asyncio.run(work())


@pytest.mark.parametrize("first, room, tokens", [(32, 10**6, 16), (1, 150, 16), (1, 10**6, 1)])
def test_a_batch_does_not_give_way_for_those_who_find_no_room(first, room, tokens):
    """Full by its rows, full by its tokens, and not full; 15 come as it works."""
    steps, began, release = [], threading.Event(), threading.Event()

    def generate(batch):
        began.set()
        release.wait(10)
        while batch.unfinished():
            if all(batch.step([Token(5)] * len(batch.rows))):
                break
        steps.append(batch.steps)

    async def work():
        batcher = Batcher(generate, {"m": frozenset()}, Metrics(), queue=200, room=room, rows_are_free=True)
        batcher.submit([Request("m", [1] * 10, 99)] * first, Mailbox())
        began.wait(10)
        batcher.submit([Request("m", [1] * 10, 99)] * 15, Mailbox())
        release.set()
        while not steps:
            await asyncio.sleep(0.01)
        batcher.close()

    asyncio.run(work())
    assert steps[0] == tokens


@given(st.floats(0, 2), st.sampled_from([0, 3, 2**31, 10**30]), st.floats(0, 1, exclude_min=True))
def test_whatever_sampling_is_asked_for_a_likely_token_is_drawn(temperature, top_k, top_p):
    asked = parse(CompletionRequest, json.dumps({
        "model": "m", "prompt": "x", "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }).encode())  # fmt: skip
    logits = torch.tensor([[0.0, 30.0, 31.0, -1e4]])
    if asked.temperature == 0:  # generate's argmax
        assert temperature < 1e-4
    else:
        sampling = {"temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
        assert int(draw(logits, rows(**sampling))) in (1, 2)


def test_rows_of_a_batch_are_drawn_as_alone_each_by_its_own_rules():
    torch.manual_seed(2)
    logits = torch.randn(4, 50) * 3
    kinds = [
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 0.5, "top_p": 0.5},
        {"temperature": 1e-3},
    ]

    def row(n):
        return Row(Request("m", [1], 8, **kinds[n]), None, frozenset(), random.Random(n))

    together = draw(logits, [row(n) for n in range(4)]).tolist()
    assert together == [int(draw(logits[n : n + 1], [row(n)])) for n in range(4)]
    assert together[3] == int(logits[3].argmax())
    assert together[1] in logits[1].topk(3).indices.tolist()
