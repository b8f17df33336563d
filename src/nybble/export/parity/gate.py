"""The gate: an artefact answers like the run it was made from, or it is not kept.

The run is asked some prompts. The artefact, loaded by another program as its user would load it, is asked the same. The ids of
the prompts must be equal and the artefact must stop where an answer ends; how far its next-token distributions lie from the run's
is held against a limit that depends on the type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.chat.answerer import Answerer
from nybble.data.batches import Sample
from nybble.data.order import batches
from nybble.data.rows.formats import Conversation, Message
from nybble.data.text.tokens import check_ids, encode_prompt, encode_text
from nybble.engine.loss import last_hidden
from nybble.errors import DataError
from nybble.evaluate.generation import FIXED, held_out_prompts
from nybble.export.merge.merge import Merge
from nybble.export.parity.compare import compare, divergences
from nybble.objective.likelihood import bare

NEW_TOKENS = 48  # of an answer: enough for most to end or to go astray
TOKENS_AT_ONCE = 4096  # of padded prompts and answers: 2 GB of Llama 2 7B's keys and values, beside its weights
HELD_OUT = 4  # prompts of validation rows, beside the conversations below
CONVERSATIONS: tuple[Conversation, ...] = (
    *((Message("user", text),) for text in FIXED),
    (Message("user", "Name a fruit."), Message("assistant", "An apple."), Message("user", "And another one?")),
    (Message("system", "Answer in one word."), Message("user", "Which animal barks?")),
    (Message("user", "Zähle auf: 1234567, 3.14,  zwei  Leerzeichen\n\n\tx = [a, b]; 你好 🙂 naïve"),),
)
"""Turns, a system message, and what tokenizers differ in: digits, repeated spaces, tabs, other scripts."""
PLAIN = CONVERSATIONS[-1][0].content
"""A text without turns, which programs begin as the tokenizer begins a text."""
FACTOR = 1.5
"""The artefact's divergence may be so many times that of its weights computed as the run computes."""
ALLOWED = {
    "adapter": 0.01,
    "bfloat16": 0.01,
    "float16": 0.005,
    "F16": 0.005,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K": 0.1,
    "Q4_K": 0.3,
}
"""And so much more, in nats per token, for what the type costs: 4 to 10 times what docs/benchmarks.md has for a model of 135M."""
ALLOWED_OTHERWISE = 1.0  # Q4_0, Q3_K and Q2_K: at 135M they ramble


@dataclass(frozen=True)
class Question:
    """A prompt; `messages` where a user would ask it as a conversation."""

    prompt: list[int]
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says to a question.

    Attributes:
        ids: greedy, without what ends it.
        ended: whether it stopped by itself.
    """

    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Reference:
    """The run's side.

    Attributes:
        questions: what is asked.
        answers: of the run, one a question.
        rows: prompt and answer with its end, one a question: what `scores` were computed on.
        scores: (answer, vocabulary) log-probabilities of each token of an answer and its end.
        expected: by base, the mean divergence of its merged weights, computed as the run computes.
        end_id: the token that ends an answer.
        template: Jinja.
        plain: ids of the text PLAIN.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]
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
            {"input_ids": row, "trained": [place >= len(question.prompt) for place in range(len(row))]}
            for question, row in zip(self.questions, self.rows, strict=True)
            if len(row) > len(question.prompt)
        ]


@dataclass(frozen=True)
class Given:
    """The artefact's side, as the program that loaded it saw it.

    Attributes:
        by: the program and its version.
        template: whether it found a chat template.
        prompts: ids of each question that has messages, through its own template and tokenizer; else None.
        answers: greedy, with what the artefact itself takes for an end.
        logits: (answer, vocabulary) of each of the reference's rows.
        stops: tokens at which it stops.
        plain: ids of the text PLAIN; None where they are not asked for.
    """

    by: str
    template: bool
    prompts: Sequence[list[int] | None]
    answers: Sequence[Answer]
    logits: Sequence[torch.Tensor]
    stops: frozenset[int]
    plain: Sequence[int] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an artefact passed, and everything that was measured."""

    kind: str
    by: str
    failures: list[str]
    numbers: dict[str, float | int]
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No failure was found."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"passed": self.passed, **asdict(self)}


def ask_run(answerer: Answerer, validation: Dataset | None, merges: Mapping[str, Merge]) -> Reference:
    """The run's answers and distributions, and what each merge should give.

    Args:
        answerer: the run.
        validation: its validation rows.
        merges: by base.
    """
    tokenizer, template = answerer.tokenizer, answerer.template
    questions = [*_conversations(answerer)]
    held_out = held_out_prompts(validation, tokenizer, HELD_OUT) if validation is not None else []
    questions += [Question(asked.prompt) for asked in held_out]
    model = bare(answerer.model)
    for question in questions:
        check_ids(question.prompt, model.config.vocab_size, tokenizer)
    stops = [template.end_id, tokenizer.eos_token_id]
    answers = greedy(model, [question.prompt for question in questions], tokenizer.pad_token_id, stops)
    end = [template.end_id]
    rows = [[*q.prompt, *a.ids, *(end if a.ended else [])] for q, a in zip(questions, answers, strict=True)]
    scores = [logits.log_softmax(-1) for logits in next_logits(model, rows, [len(q.prompt) for q in questions])]
    plain = encode_text(template, PLAIN)
    reference = Reference(questions, answers, rows, scores, {}, template.end_id, template.source, plain)
    if not merges:
        return reference
    comparison = compare(answerer, merges, reference.samples, "")
    return replace(reference, expected={name: one.kl for name, one in comparison.bases.items()})


def _conversations(answerer: Answerer) -> list[Question]:
    """Those that the template can say: some know no system message, some no second turn."""
    found = []
    for conversation in CONVERSATIONS:
        try:
            prompt = encode_prompt(answerer.template, conversation)
        except DataError:
            continue
        found.append(Question(prompt, tuple({"role": turn.role, "content": turn.content} for turn in conversation)))
    return found


def greedy(
    model: PreTrainedModel, prompts: Sequence[list[int]], pad_id: int, stops: Sequence[int] | None = None
) -> list[Answer]:
    """Greedy answers, prompts of like length in one batch, padded on the left; without `stops` the model's settings end them."""
    ends = {} if stops is None else {"eos_token_id": list(dict.fromkeys(stops))}
    known = set(stops) if stops is not None else own_stops(model)
    found: dict[int, Answer] = {}
    for places in batches([len(prompt) + NEW_TOKENS for prompt in prompts], TOKENS_AT_ONCE):
        part = [prompts[place] for place in places]
        longest = max(map(len, part))
        ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True,
                pad_token_id=pad_id, **ends,
            )[:, longest:].tolist()  # fmt: skip
        found |= {place: _cut(row, known) for place, row in zip(places, output, strict=True)}
    return [found[place] for place in range(len(prompts))]


def own_stops(model: PreTrainedModel) -> set[int]:
    """The tokens at which a model's generation settings stop."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _cut(row: list[int], stops: set[int]) -> Answer:
    place = next((n for n, token in enumerate(row) if token in stops), None)
    return Answer(row[:place], place is not None)


def next_logits(model: PreTrainedModel, rows: Sequence[list[int]], starts: Sequence[int]) -> list[torch.Tensor]:
    """What follows each row's prompt: (len(row) - start, vocabulary) float32 logits on the CPU."""
    head = model.get_output_embeddings()
    found: dict[int, torch.Tensor] = {}
    for places in batches([len(row) for row in rows], TOKENS_AT_ONCE):
        longest = len(rows[places[0]])
        ids = torch.tensor([rows[n] + [0] * (longest - len(rows[n])) for n in places], device=model.device)
        mask = torch.tensor([[1] * len(rows[n]) + [0] * (longest - len(rows[n])) for n in places], device=model.device)
        with torch.inference_mode():
            hidden = last_hidden(model, model.get_decoder(), {"input_ids": ids, "attention_mask": mask})
            for place, own in zip(places, hidden, strict=True):
                found[place] = head(own[starts[place] - 1 : len(rows[place]) - 1]).float().cpu()
    return [found[place] for place in range(len(rows))]


def judge(
    kind: str, reference: Reference, given: Given, base: str | None, tokenizer: PreTrainedTokenizerBase
) -> Verdict:
    """Hold an artefact against the run.

    Args:
        kind: adapter, the dtype of a merged model, or a GGUF type.
        reference: the run's side.
        given: the artefact's.
        base: which base it was merged into; None for an adapter, which should give what the run gives.
        tokenizer: of the run, to show what differs.
    """
    numbers = _distances(reference, given)
    expected = 0.0 if base is None else reference.expected[base]
    limit = FACTOR * expected + allowed(kind)
    numbers |= {"expected_kl": expected, "kl_limit": limit}
    ended = [sum(answer.ended for answer in side) for side in (reference.answers, given.answers)]
    failures = [*_template_failures(reference, given, tokenizer)]
    if reference.end_id not in given.stops:
        token = tokenizer.convert_ids_to_tokens(reference.end_id)
        stops = tokenizer.convert_ids_to_tokens(sorted(given.stops))
        failures.append(f"an answer ends with {token!r}, and the artefact stops at {stops} only: it would never end")
    elif ended[0] >= 3 and not ended[1]:
        failures.append(
            f"{ended[0]} of {len(reference.answers)} answers of the run end by themselves, but none of the artefact's"
        )
    if not numbers["kl"] <= limit:
        failures.append(
            f"its next-token distributions differ from the run's by {numbers['kl']:.4f} nats per token (limit {limit:.4f})"
        )
    compared = [
        _side_by_side(*sides, tokenizer)
        for sides in zip(reference.questions, reference.answers, given.answers, strict=True)
    ]
    numbers |= {
        "questions": len(compared),
        "equal_answers": sum(entry["first_difference"] is None for entry in compared),
        "run_ended": ended[0],
        "artefact_ended": ended[1],
    }
    return Verdict(kind, given.by, failures, numbers, compared)


def allowed(kind: str) -> float:
    """Nats per token that a type may cost."""
    return next((value for name, value in ALLOWED.items() if kind.startswith(name)), ALLOWED_OTHERWISE)


def _template_failures(reference: Reference, given: Given, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not given.template:
        return ["the chat template is lost"]
    asked = [question.messages[-1]["content"] if question.messages else "" for question in reference.questions]
    prompts = [question.prompt for question in reference.questions]
    pairs = [*zip(asked, prompts, given.prompts, strict=True), (PLAIN, reference.plain, given.plain)]
    for text, run, ids in pairs:
        if ids is None or list(ids) == list(run):
            continue
        place = next((n for n, (a, b) in enumerate(zip(ids, run, strict=False)) if a != b), min(len(ids), len(run)))
        ours, theirs = (tokenizer.convert_ids_to_tokens(list(side[place : place + 4])) for side in (run, ids))
        return [f"the prompt {text!r} is other tokens from place {place} on: {theirs} where the run has {ours}"]
    return []


def _distances(reference: Reference, given: Given) -> dict[str, float | int]:
    """Of all tokens of the run's answers: divergence, logits' differences, equal likeliest tokens."""
    kls, differences, equal = [], [], []
    for row, question, run, logits in zip(
        reference.rows, reference.questions, reference.scores, given.logits, strict=True
    ):
        other = logits.log_softmax(-1)
        found = divergences(run, other, torch.tensor(row[len(question.prompt) :]))
        kls.append(found[:, 0])
        equal.append(found[:, 2])
        differences.append((run - other).abs().gather(1, run.topk(10).indices))
    kl = torch.cat(kls)
    return {
        "tokens": len(kl),
        "kl": float(kl.mean()),
        "kl_worst": float(kl.max()),
        "difference_mean": float(torch.cat(differences).mean()),
        "difference_worst": float(torch.cat(differences).max()),
        "equal_likeliest": float(torch.cat(equal).mean()),
    }


def _side_by_side(
    question: Question, run: Answer, artefact: Answer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    pairs = zip(run.ids, artefact.ids, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if place is None and (len(run.ids), run.ended) != (len(artefact.ids), artefact.ended):
        place = min(len(run.ids), len(artefact.ids))
    return {
        "prompt": question.messages[-1]["content"] if question.messages else tokenizer.decode(question.prompt),
        "run": tokenizer.decode(run.ids),
        "artefact": tokenizer.decode(artefact.ids),
        "first_difference": place,
        "run_ended": run.ended,
        "artefact_ended": artefact.ended,
    }
