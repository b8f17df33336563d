"""Rows of tokens to the tensors a model is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from datasets import Dataset

IGNORED = -100
"""Label of a token the loss does not count, as torch's cross_entropy has it."""

Sample = dict[str, Any]
"""One conversation: input_ids (list of int) and trained (list of bool), of equal length."""


class PackedRows(torch.utils.data.Dataset[list[Sample]]):
    """Several samples a row.

    Args:
        samples: tokenised conversations.
        rows: positions in `samples` of what each row holds, from `packing.best_fit`.
    """

    def __init__(self, samples: Dataset, rows: Sequence[Sequence[int] | numpy.ndarray]) -> None:
        self.samples = samples
        self.members = numpy.fromiter(itertools.chain.from_iterable(rows), dtype=numpy.int64)
        self.ends = numpy.cumsum([len(row) for row in rows])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> list[Sample]:
        return [self.samples[int(n)] for n in self.row(position)]

    def row(self, position: int) -> numpy.ndarray:
        """Positions in `samples` of what a row holds."""
        end = self.ends[position]  # a negative position counts from the end
        begin = self.ends[position - 1] if position % len(self) else 0
        members: numpy.ndarray = self.members[begin:end]
        return members


@dataclass(frozen=True)
class Collator:
    """Batches samples, or packed rows of samples; tensors are int64 of shape (rows, longest) where nothing else is said.

    Padded on the right to the longest, a sample gives input_ids, attention_mask and labels. Packed rows, and samples that
    are laid flat into one row, give position_ids that restart at each sample and no attention_mask; where the samples
    begin and end is in cu_seq_lens_q and _k, int32 (samples + 1,), and their longest in max_length_q and _k, as
    Transformers' DataCollatorWithFlattening has them. No sample sees another.

    predicting, (positions,), holds the positions in the flattened rows that have a next token to be trained on: the host
    knows them, so that nobody need ask the device.
    """

    pad_id: int
    flatten: bool = False
    """Lay samples of several lengths into one row without padding, for layers that know variable-length attention."""

    def __call__(self, rows: Sequence[Sample | list[Sample]]) -> dict[str, torch.Tensor | int]:
        flat = self.flatten and len({len(row["input_ids"]) for row in rows if isinstance(row, dict)}) > 1
        packed = isinstance(rows[0], list)
        groups: Any = [rows] if flat else rows if packed else [[row] for row in rows]
        batch = self._stacked(groups)
        of_samples: dict[str, torch.Tensor | int] = {}
        if packed or flat:
            batch["position_ids"], of_samples = _positions(groups)
        elif not self.flatten:  # else of equal lengths: nothing is padded
            lengths = torch.tensor([len(row[0]["input_ids"]) for row in groups])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        _check(batch)
        predicting = (next_labels(batch["labels"]) != IGNORED).flatten().nonzero().flatten()
        return {**batch, **of_samples, "predicting": predicting}

    def _stacked(self, groups: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor]:
        """input_ids and labels, as arrays: by lists, 4 x 2,048 tokens took 5.6 ms in which the device waits."""
        rows = [_concatenated(samples) for samples in groups]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        all_ids, all_labels = numpy.full(shape, self.pad_id), numpy.full(shape, IGNORED)
        for row, (ids, labels) in enumerate(rows):
            all_ids[row, : len(ids)], all_labels[row, : len(ids)] = ids, labels
        return {"input_ids": torch.from_numpy(all_ids), "labels": torch.from_numpy(all_labels)}


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts: the labels, (rows, tokens), moved one position to the left."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _concatenated(samples: Sequence[Sample]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ids of samples one after another, and the same where they are trained. A sample's first token never is: nothing
    of its own comes before it."""
    ids = numpy.concatenate([numpy.array(sample["input_ids"], dtype=numpy.int64) for sample in samples])
    trained = [numpy.array(sample["trained"], dtype=bool) for sample in samples]
    for own in trained:
        own[0] = False
    return ids, numpy.where(numpy.concatenate(trained), ids, IGNORED)


def _positions(groups: Sequence[Sequence[Sample]]) -> tuple[torch.Tensor, dict[str, torch.Tensor | int]]:
    """Positions of every token in its sample, (rows, longest), and where samples begin; padding is one more, untrained."""
    lengths = [[len(sample["input_ids"]) for sample in row] for row in groups]
    longest = max(map(sum, lengths))
    lengths = [[*row, longest - sum(row)] if sum(row) < longest else row for row in lengths]
    positions = [numpy.concatenate([numpy.arange(length) for length in row]) for row in lengths]
    flat = [length for row in lengths for length in row]
    bounds = torch.tensor([0, *flat]).cumsum(0).to(torch.int32)
    ends: dict[str, torch.Tensor | int] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    return torch.from_numpy(numpy.stack(positions)), {**ends, "max_length_q": max(flat), "max_length_k": max(flat)}


def _check(batch: dict[str, torch.Tensor]) -> None:
    ids, labels = batch["input_ids"], batch["labels"]
    assert all(tensor.shape == ids.shape for tensor in batch.values()), "tensors of a batch differ in shape"
    counted = labels != IGNORED
    assert counted.any(dim=1).all(), "a row without a trained token"
    assert (labels[counted] == ids[counted]).all(), "a label differs from its token"
