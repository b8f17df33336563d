"""Answers to held-out prompts: how near they come to what was expected, how varied they are, whether they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from nybble.chat.answerer import Answerer, Completion, Sampling
from nybble.training.samples import first_answer
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt

AT_ONCE = 64  # prompts in a batch: a token of 4-bit weights takes as long for one as for many
ROOM = 1.5  # an answer may be so many times as long as the longest expected one
SHORTEST, LONGEST = 96, 128  # tokens that an answer may have, whatever was expected
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
FIXED = (
    "Explain in two sentences why the sky is blue.",
    "Write a short, polite e-mail that moves a meeting from Monday to Wednesday.",
    "What is 17 times 6? Answer with the number only.",
)
"""Asked of every model, so that runs on different data can be looked at side by side."""


@dataclass(frozen=True)
class Asked:
    """A prompt and what the data answers."""

    prompt: list[int]
    shown: str
    expected: str


def held_out_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Asked]:
    """The first answer's prompt of the first rows; rows that are trained on whole have none."""
    asked: list[Asked] = []
    for row in rows:
        if len(asked) == count:
            break
        place = first_answer(row)
        if place is None:
            continue
        prompt, answer = row["input_ids"][: place.start], row["input_ids"][place]
        asked.append(
            Asked(prompt, tokenizer.decode(prompt), tokenizer.decode(answer, skip_special_tokens=True).strip())
        )
    return asked


def fixed_prompts(answerer: Answerer) -> list[Asked]:
    """The prompts that every model is asked, in the run's template."""
    return [Asked(encode_prompt(answerer.template, (Message("user", text),)), text, "") for text in FIXED]


def answer(answerer: Answerer, asked: Sequence[Asked]) -> list[Completion]:
    """Greedy answers, in batches of prompts of like length."""
    longest = max((len(answerer.tokenizer(own.expected)["input_ids"]) for own in asked), default=0)
    sampling = Sampling(max_new_tokens=min(max(int(ROOM * longest), SHORTEST), LONGEST))
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].prompt))
    found: dict[int, Completion] = {}
    for first in range(0, len(order), AT_ONCE):
        places = order[first : first + AT_ONCE]
        completions = answerer.complete([asked[place].prompt for place in places], sampling)
        found |= dict(zip(places, completions, strict=True))
    return [found[place] for place in range(len(asked))]


def item_scores(asked: Sequence[Asked], answers: Sequence[Completion]) -> dict[str, list[float]]:
    """Scores of single answers, by metric: exact match, ROUGE (Lin 2004, F1, stemmed), and whether it ended by itself."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores: dict[str, list[float]] = {name: [] for name in ("exact match", *ROUGE.values(), "ends by itself")}
    for own, given in zip(asked, answers, strict=True):
        scores["exact match"].append(float(given.text == own.expected))
        for name, shown in ROUGE.items():
            scores[shown].append(scorer.score(own.expected, given.text)[name].fmeasure)
        scores["ends by itself"].append(float(given.ended))
    return scores


def distinct(answers: Sequence[Completion]) -> float:
    """Share of the answers that no other equals; one answer to everything gives 0."""
    texts = [given.text for given in answers]
    return sum(texts.count(text) == 1 for text in texts) / max(len(texts), 1)


def side_by_side(
    asked: Sequence[Asked], base: Sequence[Completion], tuned: Sequence[Completion]
) -> list[dict[str, Any]]:
    """Samples for the report."""
    return [
        {"prompt": own.shown, "expected": own.expected, "base": before.text, "tuned": after.text}
        for own, before, after in zip(asked, base, tuned, strict=True)
    ]
