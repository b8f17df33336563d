"""Checks the batches that the model will really get: they are compared with the tokenised rows and with what must be trained.

A mask without EOS, a doubled BOS or an answer that is not trained would show only after hours of training, if at all; here it
stops the run before the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from datasets import Dataset

from nybble.data.batches import IGNORED, PackedRows, Sample
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Progress
from nybble.errors import DataError

ROWS = 64  # per batch
SHOWN = 5  # faulty rows that the error names
DEFECT = "the fault is not in the data but in your own template or in nybble; please report it with this message"


@dataclass(frozen=True)
class BatchedSample:
    """A sample as it is in a batch."""

    ids: numpy.ndarray
    labels: numpy.ndarray
    counted: numpy.ndarray
    """How often the loss counts each of its tokens."""
    padding_labels: numpy.ndarray
    """Labels of the padding after it."""
    is_isolated: bool
    """Whether attention and positions begin and end with it."""
    is_fully_attended: bool
    """Whether attention sees all of it."""


@dataclass(frozen=True)
class Expected:
    """What must hold for every sample.

    Args:
        template: its tokens begin and end turns.
        train_on: answers, last or all, as in the recipe.
    """

    template: Template
    train_on: str

    def faults(self, sample: Sample, batched: BatchedSample) -> Iterator[str]:
        """What is wrong with a sample as it is in its batch."""
        ids, labels = batched.ids, batched.labels
        if not batched.is_isolated:
            yield "it can attend to other rows, or they to it"
        if not batched.is_fully_attended:
            yield "attention leaves out some of its tokens"
        if (batched.padding_labels != IGNORED).any():
            yield "padding is trained"
        if not numpy.array_equal(ids, sample["input_ids"]):
            yield "the batch's tokens differ from the row's"
            return
        trained = labels != IGNORED
        if not trained.any():
            yield "no token is trained"
            return
        if (labels[trained] != ids[trained]).any():
            yield "a label differs from its token"
        if not numpy.array_equal(trained[1:], numpy.asarray(sample["trained"], dtype=bool)[1:]):
            yield "the trained tokens are not those of the answers"
        elif not numpy.array_equal(batched.counted, trained):
            yield "the tokens that the loss counts are not those with a label"
        last = numpy.flatnonzero(trained & ~numpy.append(trained[1:], False))
        yield from self._ends(sample, ids, trained, last)
        yield from self._beginnings(sample, ids, trained, len(last))

    def _ends(self, sample: Sample, ids: numpy.ndarray, trained: numpy.ndarray, last: numpy.ndarray) -> Iterator[str]:
        ends = list(self.template.ends)
        if sample.get("is_piece", False):
            return
        if self.train_on == "all":
            if not numpy.isin(ids[trained], ends).any():
                yield "EOS is not trained"
        elif not numpy.isin(ids[last], ends).all():
            yield "EOS is not trained after an answer, so the model would not stop"

    def _beginnings(self, sample: Sample, ids: numpy.ndarray, trained: numpy.ndarray, answers: int) -> Iterator[str]:
        bos = self.template.tokenizer.bos_token_id
        if bos is None:
            return
        is_bos = ids == bos
        if (is_bos[1:] & is_bos[:-1]).any():
            yield "two BOS tokens in a row"
        first, more = self.template.bos_of_turns
        if first > 1 or self.train_on != "answers" or sample.get("is_piece", False) or trained[1:].all():
            return  # BOS begins every turn, or turns cannot be recognised by their answers, or there are no turns
        expected = first + (answers - 1) * more
        if is_bos.sum() != expected or (first and not is_bos[0]):
            yield f"{is_bos.sum()} BOS tokens, where the template {self.template.name} has {expected}"


def inspect(
    rows: Dataset | PackedRows | Sequence[Sample],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    expected: Expected,
    progress: Progress = lambda _: None,
) -> None:
    """Check every row in batches as training would see it.

    Args:
        rows: the training or validation set.
        collate: the collator that training uses.
        expected: what must hold.
        progress: called with the number of rows checked so far.

    Raises:
        DataError: something does not hold; it names the rows and what is wrong with them.
    """
    lines: list[str] = []
    for start in range(0, len(rows), ROWS):
        for sample, batched in _batched_samples(collate(group := fetched(rows, start)), group):
            if faults := list(expected.faults(sample, batched)):
                lines.append(f"  {sample.get('origin', 'a row')}: {'; '.join(faults)}")
        progress(min(start + ROWS, len(rows)))
    refuse_rows(lines)


def refuse_rows(lines: Sequence[str]) -> None:
    """Raise DataError if there are faulty rows.

    Args:
        lines: one for each of them.
    """
    if lines:
        more = [f"  and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
        raise DataError(
            "\n".join(["these rows would not be trained as they should be:", *lines[:SHOWN], *more]), fix=DEFECT
        )


def fetched(rows: Any, start: int) -> list[Any]:
    """The next rows of a set, as the collator takes them."""
    positions = range(start, min(start + ROWS, len(rows)))
    if isinstance(rows, Dataset):  # all at once: row by row takes five times as long
        columns = rows[start : positions.stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [rows[position] for position in positions]


def _batched_samples(batch: dict[str, Any], group: Sequence[Any]) -> Iterator[tuple[Sample, BatchedSample]]:
    """Each sample of the rows, and the same sample in the batch."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
    ids, labels, counted = arrays["input_ids"], arrays["labels"], _counted(arrays)
    mask, positions = arrays.get("attention_mask"), arrays.get("position_ids")
    rows = [row if isinstance(row, list) else [row] for row in group]
    if len(ids) == 1:
        rows = [list(itertools.chain.from_iterable(rows))]  # all samples are in one row, without padding
    bounds = set(arrays["cu_seq_lens_q"].tolist()) if "cu_seq_lens_q" in arrays else set()
    for number, samples in enumerate(rows):
        begin = 0
        for sample in samples:
            end = begin + len(sample["input_ids"])
            first = number * ids.shape[1] + begin
            is_alone = not bounds and len(samples) == 1
            isolated = is_alone or (first in bounds and number * ids.shape[1] + end in bounds)
            isolated &= positions is None or numpy.array_equal(positions[number, begin:end], numpy.arange(end - begin))
            attended = mask is None or bool(mask[number, begin:end].all())
            padding = labels[number, end:] if sample is samples[-1] else labels[number, end:end]
            part = slice(begin, end)
            yield (
                sample,
                BatchedSample(
                    ids[number, part], labels[number, part], counted[number, part], padding, isolated, attended
                ),
            )
            begin = end


def _counted(arrays: dict[str, numpy.ndarray]) -> numpy.ndarray:
    """How often the loss counts each token: a token is predicted at the position before it."""
    shape = arrays["input_ids"].shape
    counts = numpy.bincount(arrays["predicting"], minlength=shape[0] * shape[1]).reshape(shape)
    return numpy.roll(counts, 1, axis=1)
