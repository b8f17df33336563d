"""What the model will really be given: the collator's batches, compared with what was tokenised and what must be trained.

A mask that misses EOS, a doubled BOS or an answer nobody learns from shows only after hours of training, if at all; here it
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

ROWS = 64  # in one look
SHOWN = 5
DEFECT = "the fault is not in the data but in your own template or in nybble; please report it with this message"


@dataclass(frozen=True)
class BatchedSample:
    """A sample as it is in a batch."""

    ids: numpy.ndarray
    labels: numpy.ndarray
    counted: numpy.ndarray
    """How often the loss asks for each of its tokens."""
    behind: numpy.ndarray
    """Labels of the padding after it."""
    apart: bool
    """Whether attention and positions begin and end with it."""
    whole: bool
    """Whether attention sees all of it."""


@dataclass(frozen=True)
class Expected:
    """What must hold for every sample.

    Args:
        template: whose tokens begin and end turns.
        train_on: answers, last or all, as in the recipe.
    """

    template: Template
    train_on: str

    def faults(self, sample: Sample, given: BatchedSample) -> Iterator[str]:
        """What is wrong with a sample as the collator gives it."""
        ids, labels = given.ids, given.labels
        if not given.apart:
            yield "it can attend to other rows, or they to it"
        if not given.whole:
            yield "attention leaves out some of its tokens"
        if (given.behind != IGNORED).any():
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
        elif not numpy.array_equal(given.counted, trained):
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
            return  # BOS marks every speaker, or turns cannot be recognised by their answers, or there are none
        expected = first + (answers - 1) * more
        if is_bos.sum() != expected or (first and not is_bos[0]):
            yield f"{is_bos.sum()} BOS tokens, where the template {self.template.name} has {expected}"


def inspect(
    rows: Dataset | PackedRows | Sequence[Sample],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    expected: Expected,
    progress: Progress = lambda _: None,
) -> None:
    """Look at every batch that training would see.

    Args:
        rows: of the training or validation set.
        collate: the collator that training uses.
        expected: what must hold.
        progress: called with the number of rows looked at.

    Raises:
        DataError: with the rows in which something does not hold, and what.
    """
    found: list[str] = []
    count = 0
    for start in range(0, len(rows), ROWS):
        for sample, given in _given(collate(group := _fetched(rows, start)), group):
            wrong = list(expected.faults(sample, given))
            count += bool(wrong)
            if wrong and len(found) < SHOWN:
                found.append(f"  {sample.get('origin', 'a row')}: {'; '.join(wrong)}")
        progress(min(start + ROWS, len(rows)))
    if found:
        more = [f"  and {count - len(found):,} more"] if count > len(found) else []
        raise DataError("\n".join(["these rows would not be trained as they should be:", *found, *more]), fix=DEFECT)


def _fetched(rows: Any, start: int) -> list[Any]:
    positions = range(start, min(start + ROWS, len(rows)))
    if isinstance(rows, Dataset):  # in one go: row by row takes five times as long
        columns = rows[start : positions.stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [rows[position] for position in positions]


def _given(batch: dict[str, Any], group: Sequence[Any]) -> Iterator[tuple[Sample, BatchedSample]]:
    """Each sample of the rows with what the batch holds for it."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
    ids, labels, counted = arrays["input_ids"], arrays["labels"], _counted(arrays)
    mask, positions = arrays.get("attention_mask"), arrays.get("position_ids")
    rows = [row if isinstance(row, list) else [row] for row in group]
    if len(ids) == 1:
        rows = [list(itertools.chain.from_iterable(rows))]  # all in one, without padding
    bounds = set(arrays["cu_seq_lens_q"].tolist()) if "cu_seq_lens_q" in arrays else set()
    for number, samples in enumerate(rows):
        begin = 0
        for sample in samples:
            end = begin + len(sample["input_ids"])
            first = number * ids.shape[1] + begin
            alone = not bounds and len(samples) == 1
            apart = alone or (first in bounds and number * ids.shape[1] + end in bounds)
            apart &= positions is None or numpy.array_equal(positions[number, begin:end], numpy.arange(end - begin))
            whole = mask is None or bool(mask[number, begin:end].all())
            behind = labels[number, end:] if sample is samples[-1] else labels[number, end:end]
            own = slice(begin, end)
            yield (
                sample,
                BatchedSample(ids[number, own], labels[number, own], counted[number, own], behind, apart, whole),
            )
            begin = end


def _counted(arrays: dict[str, numpy.ndarray]) -> numpy.ndarray:
    """How often the loss asks for each token: it is predicted at the position before it."""
    shape = arrays["input_ids"].shape
    counts = numpy.bincount(arrays["predicting"], minlength=shape[0] * shape[1]).reshape(shape)
    return numpy.roll(counts, 1, axis=1)
