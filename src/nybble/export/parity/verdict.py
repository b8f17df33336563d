"""The verdict of the gate: an artefact that does not answer like its run is not kept.

The run answers some prompts (`reference`). The artefact, loaded by another program as its users would load it, answers the same
(`loaders`). The token ids of the prompts must be equal, and the artefact must stop where an answer ends; the distance of its
next-token distributions from the run's is compared with a limit that depends on the type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nybble.export.parity.compare import divergences
from nybble.export.parity.plain import GreedyAnswer
from nybble.export.parity.prompts import PLAIN, Question
from nybble.export.parity.reference import Reference

FACTOR = 1.5
"""The artefact's divergence may be this many times that of its merged weights computed in the same way as the run."""
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
"""Divergence in nats per token allowed on top for each type: 4 to 10 times what docs/benchmarks.md has for a model of 135M."""
ALLOWED_OTHERWISE = 1.0  # Q4_0, Q3_K and Q2_K, whose answers at 135M are poor


@dataclass(frozen=True)
class Observed:
    """The artefact's side: what was observed in the program that loaded it.

    Attributes:
        by: the program and its version.
        template: whether it found a chat template.
        prompts: token ids of each question with messages, by its own template and tokenizer; None for other questions.
        answers: greedy answers, ended by the artefact's own stop tokens.
        logits: (answer, vocabulary) for each of the reference's rows.
        stops: its stop tokens.
        plain: token ids of the text PLAIN; None if they are not compared.
    """

    by: str
    template: bool
    prompts: Sequence[list[int] | None]
    answers: Sequence[GreedyAnswer]
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
        """Whether there are no failures."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """The verdict for the report."""
        return {"passed": self.passed, **asdict(self)}


def judge(
    kind: str, reference: Reference, observed: Observed, base: str | None, tokenizer: PreTrainedTokenizerBase
) -> Verdict:
    """Compare an artefact with the run.

    Args:
        kind: adapter, the dtype of a merged model, or a GGUF type.
        reference: the run's side.
        observed: the artefact's side.
        base: which base the adapter was merged into; None for an adapter, which should answer exactly like the run.
        tokenizer: the run's tokenizer, to show differences.
    """
    numbers = _distances(reference, observed)
    expected = 0.0 if base is None else reference.expected[base]
    limit = FACTOR * expected + allowed(kind)
    numbers |= {"expected_kl": expected, "kl_limit": limit}
    ended = [sum(answer.ended for answer in side) for side in (reference.answers, observed.answers)]
    failures = [*_template_failures(reference, observed, tokenizer)]
    if reference.end_id not in observed.stops:
        token = tokenizer.convert_ids_to_tokens(reference.end_id)
        stops = tokenizer.convert_ids_to_tokens(sorted(observed.stops))
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
        for sides in zip(reference.questions, reference.answers, observed.answers, strict=True)
    ]
    numbers |= {
        "questions": len(compared),
        "equal_answers": sum(entry["first_difference"] is None for entry in compared),
        "run_ended": ended[0],
        "artefact_ended": ended[1],
    }
    return Verdict(kind, observed.by, failures, numbers, compared)


def allowed(kind: str) -> float:
    """The divergence allowed for a type, in nats per token."""
    return next((value for name, value in ALLOWED.items() if kind.startswith(name)), ALLOWED_OTHERWISE)


def _template_failures(reference: Reference, observed: Observed, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not observed.template:
        return ["the chat template is lost"]
    texts = [question.messages[-1]["content"] if question.messages else "" for question in reference.questions]
    prompts = [question.prompt for question in reference.questions]
    pairs = [*zip(texts, prompts, observed.prompts, strict=True), (PLAIN, reference.plain, observed.plain)]
    for text, run, ids in pairs:
        if ids is None or list(ids) == list(run):
            continue
        first = next((n for n, (a, b) in enumerate(zip(ids, run, strict=False)) if a != b), min(len(ids), len(run)))
        ours, theirs = (tokenizer.convert_ids_to_tokens(list(side[first : first + 4])) for side in (run, ids))
        return [f"the prompt {text!r} has other tokens from position {first} on: {theirs}, where the run has {ours}"]
    return []


def _distances(reference: Reference, observed: Observed) -> dict[str, float | int]:
    """Over all tokens of the run's answers: divergence, differences of log-probabilities, share of equal likeliest tokens."""
    kls, differences, equal = [], [], []
    for row, question, run, logits in zip(
        reference.rows, reference.questions, reference.scores, observed.logits, strict=True
    ):
        other = logits.log_softmax(-1)
        kl, _, same = divergences(run, other, torch.tensor(row[len(question.prompt) :])).unbind(1)
        kls.append(kl)
        equal.append(same)
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
    question: Question, run: GreedyAnswer, artefact: GreedyAnswer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    pairs = zip(run.ids, artefact.ids, strict=False)
    first = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
    if first is None and (len(run.ids), run.ended) != (len(artefact.ids), artefact.ended):
        first = min(len(run.ids), len(artefact.ids))
    return {
        "prompt": question.messages[-1]["content"] if question.messages else tokenizer.decode(question.prompt),
        "run": tokenizer.decode(run.ids),
        "artefact": tokenizer.decode(artefact.ids),
        "first_difference": first,
        "run_ended": run.ended,
        "artefact_ended": artefact.ended,
    }
