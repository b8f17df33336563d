"""Tokens to text, piece by piece."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.chat.text import TextStream, spelling
from nybble.generate.request import Token
from nybble.model.tokenizer.load import load_tokenizer
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
def test_a_stop_string_is_never_shown_wherever_tokens_end(text, stops, strip):
    stream = TextStream(TOKENIZER, stops, strip=strip)
    said = "".join(pieces(stream, ids_of(text)))
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    expected = text[: min(places)[1]] if places else text
    assert said == (expected.strip() if strip else expected)
    assert stream.stopped == bool(places)


@settings(max_examples=200)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30))
def test_bytes_that_are_not_text_become_replacement_characters(ids):
    assert "".join(pieces(TextStream(TOKENIZER, strip=False), ids)) == TOKENIZER.backend_tokenizer.decode(ids)


def test_an_incomplete_character_is_shown_as_one(tiny_tokenizer):
    (*begun, _) = ids_of("🙂", tiny_tokenizer)
    assert pieces(TextStream(tiny_tokenizer, strip=False), begun)[-1] == "\ufffd"


def test_sentencepiece_keeps_the_space_before_a_continuation(tmp_path):
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


def test_a_token_is_spelled_in_bytes(tiny_tokenizer):
    text = f"{' '.join(WORDS)} 🙂 é\n"
    spelt = [spelling(tiny_tokenizer, token_id) for token_id in ids_of(text, tiny_tokenizer)]
    assert b"".join(bytes(raw) for _, raw in spelt).decode() == text
    assert spelling(tiny_tokenizer, tiny_tokenizer.eos_token_id) == ("</s>", tuple(b"</s>"))
    assert spelling(tiny_tokenizer, 10**6) == ("", ())
