"""Turns judged answers into the tensors from which their likelihoods are computed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import xxhash
from datasets import Dataset

from nybble.data.batches import Collator, Sample

Likelihoods = Mapping[bytes, Sequence[float]]
"""The log-likelihoods in nats of a row's one or two answers, by the row's `row_key`."""


@dataclass(frozen=True)
class JudgedCollator:
    """Batches rows of judged answers, packed or not; tensors are int64 unless stated otherwise.

    input_ids, position_ids, attention_mask and the boundaries of sequences are as in `nybble.data.batches.Collator`. A batch of n
    rows has a = n answers, or, of pairs, a = 2n: first those that were chosen, then those that were rejected. m tokens are
    predicted:

        predicting (m,): the flattened position whose hidden state predicts the token.
        targets (m,): the token.
        answers (m,): the answer that it belongs to; a for a trained token of a chosen answer's prompt.
        answer_tokens (a,): tokens of each answer.
        reference (a,) float32: log-likelihoods of the answers under the reference, if they are known.
        is_good (n,) bool: the labels, if rows have no rejected answer.
        mismatched: a batch of the same prompts, each with the answer of the row before it; none counts where there is one row.
        rows: n, an int.
        imitated: tokens of the chosen answers, and of their prompts if those are trained, an int.

    Args:
        pad_id: any id; nothing attends to it.
        flatten: put all sequences into one row, for layers with variable-length attention.
        shares_prompts: write the prompt of a pair once, for an engine whose attention knows what that means.
        mismatched: whether the objective needs mismatched answers.
        reference: the answers' log-likelihoods under the reference.
    """

    pad_id: int
    flatten: bool = False
    shares_prompts: bool = False
    mismatched: bool = False
    reference: Likelihoods | None = None

    def __call__(self, rows: Sequence[Sample | list[Sample]]) -> dict[str, Any]:
        is_packed = isinstance(rows[0], list)
        examples = samples_in(rows)
        batch = self._batch(examples, is_packed)
        counted = [example for example in examples if not example.get("repeated")]
        if not examples[0]["rejected"]:
            batch["is_good"] = torch.tensor([example["is_good"] for example in counted], dtype=torch.bool)
        if self.reference is not None:
            known = [self.reference[row_key(example)] for example in counted]
            batch["reference"] = torch.tensor(list(itertools.chain.from_iterable(zip(*known, strict=True))))
        if self.mismatched:
            alone = {"repeated": True} if len(examples) == 1 else {}  # its own answer says nothing
            others = [
                {**example, "input_ids": [*_prompt(example), *_answer(other)], **alone}
                for example, other in zip(examples, [examples[-1], *examples[:-1]], strict=True)
            ]
            batch["mismatched"] = self._batch(others, is_packed)
        return batch

    def _batch(self, examples: Sequence[Sample], is_packed: bool) -> dict[str, Any]:
        shares = self.shares_prompts and self.flatten and bool(examples[0]["rejected"])
        segments = list(itertools.chain.from_iterable(_segments(example, shares) for example in examples))
        if shares:
            batch, starts = _shared(segments)
        else:
            sequences = [{"input_ids": each.ids, "trained": [True] * len(each.ids)} for each in segments]
            one_row = self.flatten or is_packed
            batch = dict(Collator(self.pad_id)([sequences] if one_row else sequences))
            width = batch["input_ids"].shape[1]
            lengths = [len(each.ids) for each in segments] if one_row else [width] * len(segments)
            starts = numpy.cumsum([0, *lengths[:-1]]).tolist()
            del batch["labels"], batch["predicting"]
        rows = sum(not example.get("repeated") for example in examples)
        return {**batch, **_predicted(segments, starts), "rows": rows}


@dataclass(frozen=True)
class _Segment:
    """Consecutive tokens in a batch, with the answer that ends them."""

    ids: list[int]
    answer: list[int]
    is_rejected: bool
    is_counted: bool
    trained_prompt: list[int] = field(default_factory=list)
    """The prompt with which it begins, if its tokens are trained."""
    after: int = 0
    """Where the prompt that it continues ends, if that is in the segment before; its own tokens have positions from here on."""


def collator_for(
    objective: str,
    pad_id: int,
    *,
    flatten: bool,
    shares_prompts: bool = False,
    reference: Likelihoods | None = None,
) -> Collator | JudgedCollator:
    """The collator of an objective's rows; arguments as for `JudgedCollator`."""
    if objective == "supervised":
        return Collator(pad_id, flatten)
    return JudgedCollator(pad_id, flatten, shares_prompts, objective == "kto", reference)


def good_rows(rows: Dataset) -> Dataset:
    """The rows whose answer may be imitated: all but those that a label calls bad."""
    return rows.select(numpy.flatnonzero(rows["is_good"])) if "is_good" in rows.column_names else rows


def samples_in(rows: Sequence[Sample | list[Sample]]) -> list[Sample]:
    """The samples of rows, packed or not."""
    return [sample for row in rows for sample in (row if isinstance(row, list) else [row])]


def row_key(row: Sample) -> bytes:
    """What a row's likelihoods are found by: a digest of its tokens (XXH3, 128 bits)."""
    digest = xxhash.xxh3_128()
    for part in ([row["prompt"], len(row["input_ids"])], row["input_ids"], row["rejected"]):
        digest.update(numpy.asarray(part, numpy.int32).tobytes())
    key: bytes = digest.digest()
    return key


def _segments(example: Sample, shares: bool) -> list[_Segment]:
    """A row's sequences: prompt and answer, for each answer; if they share the prompt, the second is the answer alone."""
    prompt, counted = _prompt(example), not example.get("repeated")
    trained = prompt if example["trained"][0] else []
    segments = [_Segment(list(example["input_ids"]), _answer(example), False, counted, trained)]
    if rejected := list(example["rejected"]):
        ids, after = (rejected, len(prompt)) if shares else ([*prompt, *rejected], 0)
        segments.append(_Segment(ids, rejected, True, counted, after=after))
    return segments


def _prompt(example: Sample) -> list[int]:
    return list(example["input_ids"][: example["prompt"]])


def _answer(example: Sample) -> list[int]:
    return list(example["input_ids"][example["prompt"] :])


def _shared(segments: Sequence[_Segment]) -> tuple[dict[str, Any], list[int]]:
    """One row in which the second answer of a pair follows the first, with positions that continue the prompt's.

    The engine reads from the positions alone what attends to what: a segment that begins at position p > 0 and does not continue
    the position before it attends to the first p tokens of its sequence, and to itself.
    """
    ids = numpy.concatenate([numpy.asarray(each.ids, numpy.int64) for each in segments])
    positions = numpy.concatenate([numpy.arange(each.after, each.after + len(each.ids)) for each in segments])
    starts = numpy.cumsum([0, *(len(each.ids) for each in segments[:-1])]).tolist()
    return {"input_ids": torch.from_numpy(ids)[None], "position_ids": torch.from_numpy(positions)[None]}, starts


def _predicted(segments: Sequence[_Segment], starts: Sequence[int]) -> dict[str, Any]:
    """Which tokens are predicted, from where, and which answer each belongs to."""
    chosen = sum(each.is_counted and not each.is_rejected for each in segments)
    answers = sum(each.is_counted for each in segments)
    following = {False: itertools.count(), True: itertools.count(chosen)}
    parts: dict[str, list[numpy.ndarray]] = {"predicting": [], "targets": [], "answers": []}
    lengths = [0] * answers

    def predict(positions: numpy.ndarray, tokens: Sequence[int], answer: int) -> None:
        parts["predicting"].append(positions)
        parts["targets"].append(numpy.asarray(tokens, numpy.int64))
        parts["answers"].append(numpy.full(len(tokens), answer))

    prompt_start = 0
    for each, start in zip(segments, starts, strict=True):
        if not each.after:
            prompt_start = start
        if not each.is_counted:
            continue
        answer, size = next(following[each.is_rejected]), len(each.answer)
        lengths[answer] = size
        if each.trained_prompt:
            predict(numpy.arange(start, start + len(each.trained_prompt) - 1), each.trained_prompt[1:], answers)
        # Its first token is predicted by the prompt's last one, which is elsewhere if the prompt is shared.
        first = prompt_start + each.after - 1 if each.after else start + len(each.ids) - size - 1
        begin = start + len(each.ids) - size
        predict(numpy.concatenate([[first], numpy.arange(begin, begin + size - 1)]), each.answer, answer)
    found = {
        name: torch.from_numpy(numpy.concatenate([numpy.empty(0, numpy.int64), *values]).astype(numpy.int64))
        for name, values in parts.items()
    }
    imitated = sum(lengths[:chosen]) + sum(len(each.trained_prompt[1:]) for each in segments if each.is_counted)
    return {**found, "answer_tokens": torch.tensor(lengths, dtype=torch.int64), "imitated": imitated}
