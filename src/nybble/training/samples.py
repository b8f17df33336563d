"""Answers to a few validation prompts while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.weights.on_cpu import dequantised_meanwhile

NEW_TOKENS = 64  # enough to see style and whether an answer ends; each costs a forward pass
SECONDS = 20.0  # that an answer may take: training waits for it


def first_answer(row: dict[str, Any]) -> slice | None:
    """Where a tokenised row's first answer stands; a row that is trained on whole has no prompt before one."""
    if row["trained"][0] or True not in row["trained"]:
        return None
    start = row["trained"].index(True)
    return slice(start, start + [*row["trained"][start:], False].index(False))


@dataclass(frozen=True)
class SampleAnswers:
    """Greedy answers to the first answer's prompt of the first `count` validation rows."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_id: int
    rows: Dataset
    count: int
    dtype: torch.dtype

    def __call__(self, tell: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """One record a prompt: prompt, answer, expected; rows that are trained on whole have no prompt to ask.

        Args:
            tell: is told before each answer how many there are, and will be.
        """
        rows = self.rows.select(range(min(self.count, len(self.rows))))
        asked = [(row, place) for row in rows if (place := first_answer(row)) is not None]
        found: list[dict[str, Any]] = []
        with dequantised_meanwhile(self.model):
            for row, place in asked:
                tell(len(found), len(asked))
                found.append(self._answer(row, place))
        return found

    def _answer(self, row: dict[str, Any], place: slice) -> dict[str, Any]:
        start = place.start
        prompt = torch.tensor([row["input_ids"][:start]], device=self.model.device)
        self.model.eval()
        with torch.no_grad(), torch.autocast(prompt.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                max_time=SECONDS,
                do_sample=False,
                use_cache=True,
                eos_token_id=list({self.end_id, self.tokenizer.eos_token_id}),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return {
            "prompt": self.tokenizer.decode(row["input_ids"][:start]),
            "answer": self.tokenizer.decode(output[0, start:]),
            "expected": self.tokenizer.decode(row["input_ids"][place]),
        }
