"""Answers to held-out prompts: how close they are to the expected ones, how varied they are, and whether they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from nybble.chat.answerer import Answerer, Continuation, Sampling
from nybble.data.answers import first_answer
from nybble.data.rows.formats import Message
from nybble.data.text.tokens import encode_prompt
from nybble.run.evaluation import ANSWER_METRICS

BATCH = 64  # prompts: with 4-bit weights a token takes as long for one prompt as for many
MARGIN = 1.5  # the limit of an answer, relative to the longest expected one
LOWEST_LIMIT, HIGHEST_LIMIT = 96, 128  # tokens; the limit is always between these
ROUGE = ("rouge1", "rouge2", "rougeL")
FIXED = (
    "Explain in two sentences why the sky is blue.",
    "Write a short, polite e-mail that moves a meeting from Monday to Wednesday.",
    "What is 17 times 6? Answer with the number only.",
)
"""Prompts for every model, so that runs on different data can be compared."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its answer in the data.

    Attributes:
        ids: token ids.
        text: the prompt as the report shows it.
        expected: the answer in the data; empty if there is none.
    """

    ids: list[int]
    text: str
    expected: str


def held_out_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """The prompts of the first answers of the first rows; rows that are trained as a whole have none."""
    prompts: list[Prompt] = []
    for row in rows:
        if len(prompts) == count:
            break
        positions = first_answer(row)
        if positions is None:
            continue
        ids, expected = row["input_ids"][: positions.start], row["input_ids"][positions]
        text = tokenizer.decode(ids)
        prompts.append(Prompt(ids, text, tokenizer.decode(expected, skip_special_tokens=True).strip()))
    return prompts


def fixed_prompts(answerer: Answerer) -> list[Prompt]:
    """The fixed prompts, in the run's template."""
    return [Prompt(encode_prompt(answerer.template, (Message("user", text),)), text, "") for text in FIXED]


def answer(answerer: Answerer, prompts: Sequence[Prompt], *, base: bool) -> list[Continuation]:
    """Greedy answers, in batches of prompts of similar length.

    Args:
        answerer: the run.
        prompts: prompts in any order.
        base: whether the base answers, without the adapter.
    """
    longest = max((len(answerer.tokenizer(prompt.expected)["input_ids"]) for prompt in prompts), default=0)
    sampling = Sampling(max_new_tokens=min(max(int(MARGIN * longest), LOWEST_LIMIT), HIGHEST_LIMIT))
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n].ids))
    answers: dict[int, Continuation] = {}
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        continuations = answerer.complete([prompts[n].ids for n in batch], sampling, base=base)
        answers |= dict(zip(batch, continuations, strict=True))
    return [answers[n] for n in range(len(prompts))]


def item_scores(prompts: Sequence[Prompt], answers: Sequence[Continuation]) -> dict[str, list[float]]:
    """The scores of each answer, by metric: exact match, ROUGE (Lin 2004, F1, stemmed), and whether it ended by itself."""
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores: dict[str, list[float]] = {name: [] for name in ANSWER_METRICS}
    for prompt, continuation in zip(prompts, answers, strict=True):
        overlap = scorer.score(prompt.expected, continuation.text)
        values = (
            continuation.text == prompt.expected, *(overlap[name].fmeasure for name in ROUGE), continuation.ended,
        )  # fmt: skip
        for name, value in zip(ANSWER_METRICS, values, strict=True):
            scores[name].append(float(value))
    return scores


def distinct(answers: Sequence[Continuation]) -> float:
    """Share of the answers that occur only once; the same answer to everything gives 0."""
    texts = [continuation.text for continuation in answers]
    return sum(texts.count(text) == 1 for text in texts) / max(len(texts), 1)


def side_by_side(
    prompts: Sequence[Prompt], base: Sequence[Continuation], tuned: Sequence[Continuation]
) -> list[dict[str, Any]]:
    """Samples for the report."""
    return [
        {"prompt": prompt.text, "expected": prompt.expected, "base": before.text, "tuned": after.text}
        for prompt, before, after in zip(prompts, base, tuned, strict=True)
    ]
