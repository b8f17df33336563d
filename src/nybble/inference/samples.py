"""Answers to a few validation prompts while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 64  # enough to see style and whether an answer ends; each costs a forward pass


@dataclass(frozen=True)
class SampleAnswers:
    """Greedy answers to the first answer's prompt of the first `count` validation rows."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_id: int
    rows: Dataset
    count: int
    dtype: torch.dtype

    def __call__(self) -> list[dict[str, Any]]:
        """One record a prompt: prompt, answer, expected; rows that are trained on whole have no prompt to ask."""
        asked = [row for row in self.rows.select(range(min(self.count, len(self.rows)))) if not row["trained"][0]]
        return [self._answer(row) for row in asked]

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        start = row["trained"].index(True)
        end = start + [*row["trained"][start:], False].index(False)
        prompt = torch.tensor([row["input_ids"][:start]], device=self.model.device)
        self.model.eval()
        with torch.no_grad(), torch.autocast(prompt.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                eos_token_id=list({self.end_id, self.tokenizer.eos_token_id}),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return {
            "prompt": self.tokenizer.decode(row["input_ids"][:start]),
            "answer": self.tokenizer.decode(output[0, start:]),
            "expected": self.tokenizer.decode(row["input_ids"][start:end]),
        }
