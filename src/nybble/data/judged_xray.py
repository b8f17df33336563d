"""Checks the batches of judged answers that the model will really get, as `nybble.data.xray` does for answers to imitate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from datasets import Dataset

from nybble.data.batches import PackedRows, Sample
from nybble.data.judged_batches import samples_in
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Progress
from nybble.data.xray import ROWS, fetched, refuse_rows


@dataclass(frozen=True)
class ExpectedJudged:
    """What must hold for every row.

    Args:
        template: its tokens end answers.
    """

    template: Template

    def faults(self, row: Sample, answers: Sequence[ReadAnswer]) -> Iterator[str]:
        """What is wrong with a row's answers as they are in its batch."""
        prompt = row["input_ids"][: row["prompt"]]
        expected = [row["input_ids"][row["prompt"] :], *([row["rejected"]] if row["rejected"] else [])]
        if len(answers) != len(expected):
            yield f"the batch has {len(answers)} of its {len(expected)} answers"
            return
        for name, answer, ids in zip(("chosen", "rejected"), answers, expected, strict=False):
            if not numpy.array_equal(answer.targets, ids):
                yield f"the likelihood of the {name} answer is that of other tokens"
            elif not numpy.array_equal(answer.read, [*prompt, *ids[:-1]]):
                yield f"the {name} answer is predicted after something else than its prompt and itself"
            elif not numpy.array_equal(answer.positions, numpy.arange(len(answer.read))):
                yield f"the positions of the {name} answer do not count from the start of its prompt"
            elif not answer.is_isolated:
                yield f"the {name} answer can attend to other rows, or they to it"
            if ids[-1] not in self.template.ends:
                yield f"the {name} answer has no EOS, so the model would not learn to stop"


@dataclass(frozen=True)
class ReadAnswer:
    """An answer as a batch has it."""

    targets: numpy.ndarray
    """The tokens that are predicted."""
    read: numpy.ndarray
    """The tokens before the last of them, from the start of the prompt on."""
    positions: numpy.ndarray
    """Their positions."""
    is_isolated: bool
    """Whether attention begins and ends with its sequence."""


def inspect_judged(
    rows: Dataset | PackedRows | Sequence[Sample],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    expected: ExpectedJudged,
    progress: Progress = lambda _: None,
) -> None:
    """Check every row in batches as training would see it; arguments and errors as in `nybble.data.xray.inspect`."""
    lines: list[str] = []
    for start in range(0, len(rows), ROWS):
        group = fetched(rows, start)
        samples = samples_in(group)
        batch = {name: part.numpy() for name, part in collate(group).items() if isinstance(part, torch.Tensor)}
        count = len(samples)
        for number, row in enumerate(samples):
            answers = [number, number + count] if row["rejected"] else [number]
            faults = list(expected.faults(row, [_read(batch, answer, row["prompt"]) for answer in answers]))
            if faults:
                lines.append(f"  {row.get('origin', 'a row')}: {'; '.join(faults)}")
        progress(min(start + ROWS, len(rows)))
    refuse_rows(lines)


def _read(batch: dict[str, numpy.ndarray], answer: int, prompt: int) -> ReadAnswer:
    """Find an answer and its prompt in a batch, by the positions that predict it."""
    ids, own = batch["input_ids"], batch["answers"] == answer
    width = ids.shape[1]
    predicting = batch["predicting"][own]
    begin = predicting[0] - prompt + 1  # the position of the prompt's first token, flattened
    where = numpy.concatenate([numpy.arange(begin, predicting[0]), predicting])
    flat = ids.flatten()
    positions = batch["position_ids"].flatten()[where] if "position_ids" in batch else where - begin
    if "attention_mask" in batch:
        isolated = begin % width == 0 and bool(batch["attention_mask"].flatten()[where].all())
    elif "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"]
        isolated = bool(begin in bounds and (predicting[-1] + 2) in bounds)
    else:  # by the positions alone, which are compared above
        isolated = True
    return ReadAnswer(batch["targets"][own], flat[where], positions, isolated)
