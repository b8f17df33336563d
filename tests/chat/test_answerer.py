"""Messages in, text out: base and tuned side by side, seeds, streaming, Ctrl-C."""

from __future__ import annotations

import io
import signal

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.chat.terminal import AnswerPrinter, talk
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import ModelError
from nybble.generate.request import Token
from nybble.training.samples import SampleAnswers
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


def test_a_seeded_answer_goes_on_from_its_own_beginning(answerer):
    (prompt,) = [encode_prompt(answerer.template, ASKED[0])]
    (whole,) = answerer.complete([prompt], WARM)
    begin = whole.ids[:4]
    assert len(begin) == 4
    (rest,) = answerer.complete([prompt + begin], Sampling(8, temperature=1.5, top_p=0.95, seed=7))
    assert begin + rest.ids == whole.ids


def test_logits_that_are_no_numbers_are_an_error(tuned_run, cache):
    broken = load_answerer(tuned_run, cache)
    with torch.no_grad():
        broken.model.get_base_model().model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="infinite or NaN"):
        broken.answer(ASKED, Sampling(4))


def test_a_sample_that_cannot_be_made_is_recorded_and_the_others_are_shared_out(tuned_run, cache):
    answerer = load_answerer(tuned_run, cache)
    prompts = [encode_prompt(answerer.template, conversation) for conversation in ASKED]
    rows = [{"input_ids": [*ids, 5, 6], "trained": [False] * len(ids) + [True] * 2} for ids in prompts]
    rows.append({"input_ids": [5, 6], "trained": [True] * 2})
    sampler = SampleAnswers(
        answerer.model, answerer.tokenizer, answerer.template.end_id, Dataset.from_list(rows), 4, torch.float32
    )
    told: list[tuple[int, int]] = []
    records = sampler(lambda done, of: told.append((done, of)))
    assert told == [(0, 3), (1, 3), (2, 3)]
    shares = [sampler(lambda *_: None, slice(rank, None, 2)) for rank in range(2)]
    assert [shares[0][0], shares[1][0], shares[0][1]] == records
    expected = answerer.tokenizer.decode([5, 6])
    for record, prompt, text in zip(records, prompts, answerer.answer(ASKED, Sampling(64)), strict=True):
        assert record["prompt"] == answerer.tokenizer.decode(prompt)
        assert record["answer"].removesuffix("</s>").strip() == text
        assert record["expected"] == expected
    with torch.no_grad():
        answerer.model.get_base_model().model.norm.weight.fill_(torch.nan)
    records = sampler(lambda *_: None)
    assert [record["answer"] for record in records] == [""] * 3
    assert all("infinite or NaN" in record["error"] for record in records)


@settings(max_examples=50, deadline=None)
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


def test_ctrl_c_ends_an_answer_and_not_the_chat(answerer, monkeypatch):
    on_token, seen = AnswerPrinter.on_token, []

    def interrupted(self, number, token):
        on_token(self, number, token)
        seen.append(token.id)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerPrinter, "on_token", interrupted)
    lines = iter(["say one two 3", "say cat", "/exit"])
    console = Console(file=io.StringIO(), width=100)
    talk(answerer, Sampling(6), console, read=lambda _: next(lines))
    shown = console.file.getvalue()
    assert shown.count("(stopped)") == 1
    (answer,) = answerer.complete([encode_prompt(answerer.template, ASKED[1])], Sampling(6))
    assert seen[2 : 2 + len(answer.ids)] == answer.ids, "the second message is answered as if it were the first"
    assert shown.index("(stopped)") < shown.rindex(answer.text)
