"""The run's side of the gate: its answers, its distributions, and how far each merge of it should be from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from datasets import Dataset

from nybble.chat.answerer import Answerer, Sampling
from nybble.data.batches import Sample
from nybble.data.order import batches
from nybble.data.text.tokens import encode_text
from nybble.export.merge.merge import Merge
from nybble.export.parity.compare import compare
from nybble.export.parity.plain import BATCH_TOKENS, NEW_TOKENS, GreedyAnswer, next_logits
from nybble.export.parity.prompts import PLAIN, Question, questions_for
from nybble.objective.likelihood import bare


@dataclass(frozen=True)
class Reference:
    """What the run answers.

    Attributes:
        questions: what is asked.
        answers: of the run, one per question.
        rows: prompt and answer with its end, one per question: what `scores` were computed on.
        scores: (answer, vocabulary) log-probabilities of each token of an answer and its end.
        expected: by base, the mean divergence of its merged weights, computed as the run computes.
        end_id: the token that ends an answer.
        template: Jinja.
        plain: ids of the text PLAIN.
    """

    questions: Sequence[Question]
    answers: Sequence[GreedyAnswer]
    rows: Sequence[list[int]]
    scores: Sequence[torch.Tensor]
    expected: Mapping[str, float]
    end_id: int
    template: str
    plain: Sequence[int] = ()

    @property
    def samples(self) -> list[Sample]:
        """The rows as they are compared: the answers count, and rows without one are left out."""
        return [
            {"input_ids": row, "trained": [position >= len(question.prompt) for position in range(len(row))]}
            for question, row in zip(self.questions, self.rows, strict=True)
            if len(row) > len(question.prompt)
        ]


def ask_run(answerer: Answerer, validation: Dataset | None, merges: Mapping[str, Merge]) -> Reference:
    """The run's answers and distributions, and what each merge should give.

    Args:
        answerer: the run.
        validation: its validation rows.
        merges: by base.

    Raises:
        DataError: a token id without an embedding.
    """
    template, questions = answerer.template, questions_for(answerer, validation)
    prompts = [question.prompt for question in questions]
    answers = _answers(answerer, prompts)
    end = [template.end_id]
    rows = [[*prompt, *a.ids, *(end if a.ended else [])] for prompt, a in zip(prompts, answers, strict=True)]
    logits = next_logits(bare(answerer.model), rows, [len(prompt) for prompt in prompts])
    scores = [row.log_softmax(-1) for row in logits]
    plain = encode_text(template, PLAIN)
    reference = Reference(questions, answers, rows, scores, {}, template.end_id, template.source, plain)
    if not merges:
        return reference
    comparison = compare(answerer, merges, reference.samples, "")
    return replace(reference, expected={name: one.kl for name, one in comparison.bases.items()})


def _answers(answerer: Answerer, prompts: Sequence[list[int]]) -> list[GreedyAnswer]:
    """The run's answers, prompts of similar length in one batch."""
    answers: dict[int, GreedyAnswer] = {}
    for batch in batches([len(prompt) + NEW_TOKENS for prompt in prompts], BATCH_TOKENS):
        made = answerer.complete([prompts[n] for n in batch], Sampling(max_new_tokens=NEW_TOKENS))
        answers |= {n: GreedyAnswer(answer.ids, answer.ended) for n, answer in zip(batch, made, strict=True)}
    return [answers[n] for n in range(len(prompts))]
