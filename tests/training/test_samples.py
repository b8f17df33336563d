"""Answers to validation prompts during training."""

from __future__ import annotations

import torch
from datasets import Dataset

from nybble.chat.answerer import Sampling
from nybble.chat.loading import load_answerer
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.training.samples import SampleAnswers

ASKED = [(Message("user", text),) for text in ("say one two 3", "say cat", "say red blue green 11")]


def test_samples_are_the_answers_of_the_run_row_by_row_and_one_that_cannot_be_made_is_recorded(tuned_run, cache):
    answerer = load_answerer(tuned_run, cache)
    prompts = [encode_prompt(answerer.template, conversation) for conversation in ASKED]
    rows = [{"input_ids": [*ids, 5, 6], "trained": [False] * len(ids) + [True] * 2} for ids in prompts]
    rows.append({"input_ids": [5, 6], "trained": [True] * 2})  # a document: it has no prompt

    def sampler(rows, count=4):
        dataset = Dataset.from_list(rows)
        return SampleAnswers(answerer.model, answerer.tokenizer, answerer.template.ends, dataset, count, torch.float32)

    told: list[tuple[int, int]] = []
    records = sampler(rows)(lambda done, of: told.append((done, of)))
    assert told == [(0, 3), (1, 3), (2, 3)]
    assert [sampler([row])(lambda *_: None) for row in rows] == [*([record] for record in records), []]
    assert sampler(rows, 2)(lambda *_: None) == records[:2]
    expected = answerer.tokenizer.decode([5, 6])
    for record, prompt, text in zip(records, prompts, answerer.answer(ASKED, Sampling(64)), strict=True):
        assert record["prompt"] == answerer.tokenizer.decode(prompt)
        assert record["answer"].removesuffix("</s>").strip() == text
        assert record["expected"] == expected
    with torch.no_grad():
        answerer.model.get_base_model().model.norm.weight.fill_(torch.nan)
    records = sampler(rows)(lambda *_: None)
    assert [record["answer"] for record in records] == [""] * 3
    assert all("infinite or NaN" in record["error"] for record in records)


def test_an_answer_ends_with_the_context_and_a_prompt_that_fills_it_has_none(tuned_run, cache):
    answerer = load_answerer(tuned_run, cache)
    positions = answerer.model.config.max_position_embeddings
    rows = [
        {"input_ids": [*[5] * count, 6], "trained": [False] * count + [True]} for count in (positions - 3, positions)
    ]
    ask = SampleAnswers(
        answerer.model, answerer.tokenizer, frozenset(), Dataset.from_list(rows), 2, torch.float32, cache
    )
    first, second = ask(lambda *_: None)
    assert "error" not in first
    assert second["error"] == "the prompt fills the model's context"
