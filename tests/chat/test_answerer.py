"""Messages in, text out: base and tuned side by side, seeds, streaming, Ctrl-C."""

from __future__ import annotations

import io
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.chat.terminal import AnswerPrinter, talk
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import DataError, ModelError
from nybble.generate.request import Token
from tests.conftest import small_tokenizer

TOKENIZER = small_tokenizer()
ASKED = [(Message("user", text),) for text in ("say one two 3", "say cat", "say red blue green 11")]
WARM = Sampling(12, temperature=1.5, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def answerer(tuned_run, cache):
    return load_answerer(tuned_run, cache)


def test_the_base_answers_where_it_is_asked_for_and_where_the_adapter_is_off(answerer):
    sampling = Sampling(12)
    tuned, base = answerer.answer(ASKED, sampling), answerer.answer(ASKED, sampling, base=True)
    assert tuned != base
    with answerer.as_base():
        assert answerer.answer(ASKED, sampling) == base
    with answerer.as_tuned(False):
        assert answerer.answer(ASKED, sampling) == base
    with answerer.as_tuned(True):
        assert answerer.answer(ASKED, sampling) == tuned
    assert answerer.answer(ASKED, sampling) == tuned, "what was asked of the base leaves no trace"


def test_a_seeded_answer_does_not_depend_on_its_neighbours(answerer):
    prompts = [encode_prompt(answerer.template, conversation) for conversation in ASKED]
    together = [one.ids for one in answerer.complete(prompts, WARM)]
    assert together == [one.ids for one in answerer.complete(prompts, WARM)]
    for number, prompt in enumerate(prompts):  # each has a seed of its own, or equal prompts would be answered alike
        own = Sampling(12, temperature=1.5, top_p=0.95, seed=7 + number)
        assert [one.ids for one in answerer.complete([prompt], own)] == [together[number]]
    twins = answerer.complete([prompts[0]] * 2, WARM)
    assert twins[0].ids != twins[1].ids
    assert answerer.complete(prompts, Sampling(12, temperature=1.5, top_p=0.95, seed=8))[0].ids != together[0]


def test_a_seeded_answer_can_be_continued_from_its_own_beginning(answerer):
    (prompt,) = [encode_prompt(answerer.template, ASKED[0])]
    (whole,) = answerer.complete([prompt], WARM)
    begin = whole.ids[:4]
    assert len(begin) == 4
    (rest,) = answerer.complete([prompt + begin], Sampling(8, temperature=1.5, top_p=0.95, seed=7))
    assert begin + rest.ids == whole.ids


def test_logits_that_are_not_finite_are_an_error(tuned_run, cache):
    broken = load_answerer(tuned_run, cache)
    with torch.no_grad():
        broken.model.get_base_model().model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="infinite or NaN"):
        broken.answer(ASKED, Sampling(4))


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from([*"ab \n", "🙂", "日", "é", "one ", ":smile:", "[red]", "\n\n", "x" * 90]), max_size=12)
)
def test_what_is_streamed_is_the_text(parts):
    class Talker:
        tokenizer = TOKENIZER

    text = "".join(parts)
    console = Console(file=io.StringIO(), width=40)
    printer = AnswerPrinter(Talker, console)
    for token_id in [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]:
        printer.on_token(0, Token(token_id))
    printer.end()
    assert console.file.getvalue() == text + "\n"


def test_ctrl_c_ends_an_answer_and_not_the_chat(answerer, monkeypatch, request):
    on_token, seen = AnswerPrinter.on_token, []

    def interrupted(self, number, token):
        on_token(self, number, token)
        seen.append(token.id)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerPrinter, "on_token", interrupted)
    # A shell starts what it runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    lines = iter(["say one two 3", "say cat", "/exit"])
    console = Console(file=io.StringIO(), width=100)
    talk(answerer, Sampling(6), console, read=lambda _: next(lines))
    shown = console.file.getvalue()
    assert shown.count("(stopped)") == 1
    (answer,) = answerer.complete([encode_prompt(answerer.template, ASKED[1])], Sampling(6))
    assert seen[2 : 2 + len(answer.ids)] == answer.ids, "the second message is answered as if it were the first"
    assert shown.index("(stopped)") < shown.rindex(answer.text)


def test_an_answer_ends_with_the_context_and_a_prompt_beyond_it_is_refused(answerer, capsys):
    positions = answerer.model.config.max_position_embeddings
    (continuation,) = answerer.complete([[50] * (positions - 4)], Sampling(512))
    assert 1 <= len(continuation.ids) <= 4
    with pytest.raises(DataError) as refused:
        answerer.complete([[5] * 3, [5] * positions])
    print(refused.value, refused.value.fix)
    shown = capsys.readouterr().out
    assert f"a prompt of {positions:,} tokens leaves no room for an answer: the context length of the model is" in shown
    assert "a shorter prompt" in shown
