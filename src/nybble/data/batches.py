"""Rows of tokens to the tensors a model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def __init__(self, samples: Dataset, rows: Sequence[Sequence[int]]) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> list[Sample]:
        return [self.samples[n] for n in self.rows[position]]


@dataclass(frozen=True)
class Collator:
    """Batches samples, or packed rows of samples, padded on the right to the longest.

    A sample gives input_ids, attention_mask and labels. A packed row gives position_ids that begin anew at each sample
    and no attention_mask, from which Transformers (masking_utils.find_packed_sequence_indices) builds a mask that is
    block-diagonal: no sample sees another. These tensors are int64 of shape (rows, longest).

    logits_to_keep, (positions,), says after which positions any row has a token to predict. Transformers applies the head
    there only; prompts take no logits, which are the largest tensors of a step: 32,000 numbers a token for LLaMA 2.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Sample | list[Sample]]) -> dict[str, torch.Tensor]:
        packed = isinstance(rows[0], list)
        batch = self._packed(rows) if packed else self._padded(rows)  # type: ignore[arg-type]
        _check(batch)
        batch["logits_to_keep"] = (next_labels(batch["labels"]) != IGNORED).any(dim=0).nonzero().flatten()
        return batch

    def _padded(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": _pad(ids, self.pad_id),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "labels": _pad([_labels(row) for row in rows], IGNORED),
        }

    def _packed(self, rows: Sequence[list[Sample]]) -> dict[str, torch.Tensor]:
        longest = max(sum(len(sample["input_ids"]) for sample in row) for row in rows)
        positions = []
        for row in rows:
            places = [place for sample in row for place in range(len(sample["input_ids"]))]
            positions.append(places + list(range(longest - len(places))))  # the padding is one more sample, untrained
        return {
            "input_ids": _pad(
                [[token for sample in row for token in sample["input_ids"]] for row in rows], self.pad_id
            ),
            "position_ids": torch.tensor(positions),
            "labels": _pad([[label for sample in row for label in _labels(sample)] for row in rows], IGNORED),
        }


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """What each position predicts: the labels, (rows, tokens), moved one place to the left."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _labels(sample: Sample) -> list[int]:
    """Ids where they are trained. The first token is never: nothing of its own sample comes before it."""
    labels = [
        token if trained else IGNORED for token, trained in zip(sample["input_ids"], sample["trained"], strict=True)
    ]
    labels[0] = IGNORED
    return labels


def _pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _check(batch: dict[str, torch.Tensor]) -> None:
    ids, labels = batch["input_ids"], batch["labels"]
    assert all(tensor.shape == ids.shape for tensor in batch.values()), "tensors of a batch differ in shape"
    counted = labels != IGNORED
    assert counted.any(dim=1).all(), "a row without a trained token"
    assert (labels[counted] == ids[counted]).all(), "a label differs from its token"
