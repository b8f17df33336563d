"""Benchmarks during training: one point of each curve per evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nybble.distributed.heartbeat import beat
from nybble.evaluate.scores import Benchmarks
from nybble.weights.on_cpu import temporarily_dequantised


@dataclass(frozen=True)
class TaskScores:
    """Scores of the current model; all processes must call it, since each answers a share of every benchmark."""

    benchmarks: Benchmarks
    tasks: Sequence[str]
    model: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype

    def __call__(self) -> dict[str, float]:
        """Mean score by task."""
        self.model.eval()
        device = self.model.device.type
        means = {}
        for name in self.tasks:
            with (
                temporarily_dequantised(self.model),
                self.benchmarks.benchmark(name) as benchmark,
                torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32),
            ):
                scored = self.benchmarks.score(benchmark, self.model, self.tokenizer, lambda _: beat())
            means[name] = sum(scored.values) / len(scored.values)
        return means
