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
    """Batches samples, or packed rows of samples; tensors are int64 of shape (rows, longest) where nothing else is said.

    Padded on the right to the longest, a sample gives input_ids, attention_mask and labels. Packed rows, and samples that
    are laid flat into one row, give position_ids that begin anew at each sample and no attention_mask; where the samples
    begin and end stands in cu_seq_lens_q and _k, int32 (samples + 1,), and their longest in max_length_q and _k, as
    Transformers' DataCollatorWithFlattening has them. No sample sees another.

    predicting, (positions,), holds the places of the flattened rows that have a next token to be trained on: the host
    knows them, so that nobody need ask the device.
    """

    pad_id: int
    flatten: bool = False
    """Lay samples of several lengths into one row without padding, for layers that know variable-length attention."""

    def __call__(self, rows: Sequence[Sample | list[Sample]]) -> dict[str, torch.Tensor | int]:
        if isinstance(rows[0], list):
            batch = self._packed(rows)  # type: ignore[arg-type]
        elif self.flatten and len({len(row["input_ids"]) for row in rows}) > 1:  # type: ignore[call-overload]
            batch = self._packed([rows])  # type: ignore[list-item]
        else:
            batch = self._padded(rows)  # type: ignore[arg-type]
        predicting = (next_labels(batch["labels"]) != IGNORED).flatten().nonzero().flatten()  # type: ignore[arg-type]
        return {**batch, "predicting": predicting}

    def _padded(self, rows: Sequence[Sample]) -> dict[str, torch.Tensor | int]:
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": _pad(ids, self.pad_id),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "labels": _pad([_labels(row) for row in rows], IGNORED),
        }
        _check(batch)
        if self.flatten:  # equal lengths: nothing is padded
            del batch["attention_mask"]
        return {**batch}

    def _packed(self, rows: Sequence[Sequence[Sample]]) -> dict[str, torch.Tensor | int]:
        longest = max(sum(len(sample["input_ids"]) for sample in row) for row in rows)
        positions, lengths = [], [0]
        for row in rows:
            places = [place for sample in row for place in range(len(sample["input_ids"]))]
            padding = longest - len(places)  # one more sample, untrained
            positions.append(places + list(range(padding)))
            lengths += [len(sample["input_ids"]) for sample in row] + ([padding] if padding else [])
        batch = {
            "input_ids": _pad(
                [[token for sample in row for token in sample["input_ids"]] for row in rows], self.pad_id
            ),
            "position_ids": torch.tensor(positions),
            "labels": _pad([[label for sample in row for label in _labels(sample)] for row in rows], IGNORED),
        }
        _check(batch)
        bounds = torch.tensor(lengths).cumsum(0).to(torch.int32)
        of_samples = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return {**batch, **of_samples, "max_length_q": max(lengths), "max_length_k": max(lengths)}


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
