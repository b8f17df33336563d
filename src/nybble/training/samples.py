"""Answers to a few validation prompts during training."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from nybble.chat.answerer import context_length, explained_failures
from nybble.data.answers import first_answer
from nybble.errors import DeviceError, ModelError
from nybble.generate.kept import KeptGenerator
from nybble.generate.request import Request, complete
from nybble.weights.on_cpu import temporarily_dequantised

NEW_TOKENS = 64  # enough to see style and whether an answer ends; each costs a forward pass
SECONDS = 20.0  # the longest that an answer may take, since training waits for it


@dataclass(frozen=True)
class SampleAnswers:
    """Greedy answers to the first prompts of the first `count` rows; never waits for other processes.

    Args:
        model: the model in training; it is in evaluation mode afterwards.
        tokenizer: the run's tokenizer.
        stop_ids: tokens that end an answer.
        rows: validation rows, or a process's share of them.
        count: the largest number of rows.
        dtype: the compute type of training.
        cache: the cache folder; None for the user's own.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    rows: Dataset
    count: int
    dtype: torch.dtype
    cache: pathlib.Path | None = None

    def __call__(self, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """One record per prompt: prompt, answer, expected, and error if there is no answer; rows that are trained as a whole have
        no prompt.

        Args:
            progress: called before each answer with the number done and the total.
        """
        rows = self.rows.select(range(min(self.count, len(self.rows))))
        prompts = [(row, answer) for row in rows if (answer := first_answer(row)) is not None]
        records: list[dict[str, Any]] = []
        self.model.eval()
        with temporarily_dequantised(self.model):
            # No larger than the longest answer: training's own memory comes first.
            longest = max((answer.start + NEW_TOKENS for _, answer in prompts), default=0)
            kept = KeptGenerator(self.model, self.tokenizer.pad_token_id, self.cache, least_tokens=longest)
            for row, answer in prompts:
                progress(len(records), len(prompts))
                records.append(self._answer(kept, row, answer))
        return records

    def _answer(self, kept: KeptGenerator, row: dict[str, Any], answer: slice) -> dict[str, Any]:
        prompt, device = row["input_ids"][: answer.start], self.model.device.type
        adapter = self.model.active_adapter
        limit = min(NEW_TOKENS, context_length(self.model) - len(prompt))
        record = {"prompt": self.tokenizer.decode(prompt), "answer": ""}
        expected = self.tokenizer.decode(row["input_ids"][answer])
        if limit < 1:
            return {**record, "error": "the prompt fills the model's context", "expected": expected}
        request = Request(prompt, limit, adapter, self.stop_ids, deadline=time.monotonic() + SECONDS)
        try:
            with (
                explained_failures(),
                torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32),
                kept.using([request]) as generator,
            ):
                (completed,) = complete(generator, [request])
            record["answer"] = self.tokenizer.decode(completed.ids)
        except (DeviceError, ModelError) as error:  # training can go on without this answer
            record["error"] = error.what
        return {**record, "expected": expected}
