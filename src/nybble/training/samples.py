"""Answers to a few validation prompts during training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from nybble.chat.answerer import explained_failures
from nybble.data.answers import first_answer
from nybble.errors import DeviceError, ModelError
from nybble.generate.padded import Padded
from nybble.generate.request import Request, complete
from nybble.weights.on_cpu import temporarily_dequantised

NEW_TOKENS = 64  # enough to see style and whether an answer ends; each costs a forward pass
SECONDS = 20.0  # that an answer may take: training waits for it


@dataclass(frozen=True)
class SampleAnswers:
    """Greedy answers to the prompts before the first answers of the first `count` rows; nothing in it waits for other processes.

    Args:
        model: the one that trains; it is in evaluation mode afterwards.
        tokenizer: the run's.
        stop_ids: tokens that end an answer.
        rows: validation rows, or a process's share of them.
        count: of them, at most.
        dtype: what training computes in.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    rows: Dataset
    count: int
    dtype: torch.dtype

    def __call__(self, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """One record per prompt: prompt, answer, expected, and error where it could not be answered; rows that are trained as a
        whole have no prompt.

        Args:
            progress: is told before each answer how many there are, and how many there will be.
        """
        rows = self.rows.select(range(min(self.count, len(self.rows))))
        prompts = [(row, answer) for row in rows if (answer := first_answer(row)) is not None]
        records: list[dict[str, Any]] = []
        with temporarily_dequantised(self.model):
            for row, answer in prompts:
                progress(len(records), len(prompts))
                records.append(self._answer(row, answer))
        return records

    def _answer(self, row: dict[str, Any], answer: slice) -> dict[str, Any]:
        prompt, device = row["input_ids"][: answer.start], self.model.device.type
        adapter = self.model.active_adapter
        request = Request(prompt, NEW_TOKENS, adapter, self.stop_ids, deadline=time.monotonic() + SECONDS)
        record = {"prompt": self.tokenizer.decode(prompt), "answer": ""}
        self.model.eval()
        generator = Padded(self.model, self.tokenizer.pad_token_id)
        try:
            with (
                explained_failures(),
                contextlib.closing(generator),
                torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32),
            ):
                (completed,) = complete(generator, [request])
            record["answer"] = self.tokenizer.decode(completed.ids)
        except (DeviceError, ModelError) as error:  # training can go on without this answer
            record["error"] = error.what
        return {**record, "expected": self.tokenizer.decode(row["input_ids"][answer])}
