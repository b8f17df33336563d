"""Padded batches through the Transformers generate loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, StoppingCriteria

from nybble.generate.request import Finish, Handle, Request, Sink, Token


class _Row:
    def __init__(self, request: Request, sink: Sink) -> None:
        self.request, self.sink, self.made = request, sink, 0
        self.finish: Finish | None = None

    def cancel(self) -> None:
        self.end("cancelled")

    def end(self, finish: Finish) -> None:
        if self.finish is None:
            self.finish = finish
            self.sink.end(finish)

    def take(self, token: int) -> bool:
        if self.finish is None:
            self.made += 1
            self.sink.put(Token(token))
            request = self.request
            if token in request.stop_ids:
                self.end("stop")
            elif self.made == request.max_tokens:
                self.end("length")
            elif request.deadline is not None and time.monotonic() > request.deadline:
                self.end("deadline")
        return self.finish is not None


class _Steps(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        done = [row.take(token) for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True)]
        return torch.tensor(done, device=input_ids.device)


class Padded:
    """A stand-in."""

    def __init__(self, model: PeftModel, pad_id: int, *, rows: int = 32) -> None:
        self.peft, self.model, self.pad_id = model, model.get_base_model(), pad_id
        self.vocabulary, self.positions = self.model.config.vocab_size, self.model.config.max_position_embeddings
        self.waiting: list[_Row] = []

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[Handle]:
        rows = [_Row(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        self.waiting += rows
        return list(rows)

    def step(self) -> bool:
        if not self.waiting:
            return False
        adapter = self.waiting[0].request.adapter
        rows = [row for row in self.waiting if row.request.adapter == adapter]
        self.waiting = [row for row in self.waiting if row not in rows]
        if adapter is None:
            with self.peft.disable_adapter():
                self._generate(rows)
        else:
            self._generate(rows)
        return True

    def close(self) -> None:
        self.waiting = []

    def _generate(self, rows: Sequence[_Row]) -> None:
        prompts: list[list[int]] = [list(row.request.prompt) for row in rows]
        shared = _common_prefix(prompts) if len(rows) > 1 else 0
        ids, mask = (part.to(self.model.device) for part in _pad_after(prompts, shared, self.pad_id))
        temperature = rows[0].request.temperature
        settings: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            settings |= {"temperature": temperature, "top_p": rows[0].request.top_p}
        with torch.no_grad():
            if shared:
                cache = DynamicCache(config=self.model.config)
                self.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache.batch_repeat_interleave(len(rows))
                settings["past_key_values"] = cache
            self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(row.request.max_tokens for row in rows),
                use_cache=True, eos_token_id=None, pad_token_id=self.pad_id, stopping_criteria=[_Steps(rows)], **settings,
            )  # fmt: skip


def _common_prefix(rows: Sequence[list[int]]) -> int:
    first, last = min(rows), max(rows)
    limit = min(map(len, rows)) - 1
    return next((n for n in range(limit) if first[n] != last[n]), limit)


def _pad_after(rows: Sequence[list[int]], shared: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[*row[:shared], *[pad_id] * gap, *row[shared:]] for row, gap in zip(rows, gaps, strict=True)]
    mask = [[*[1] * shared, *[0] * gap, *[1] * (longest - shared - gap)] for gap in gaps]
    return torch.tensor(ids), torch.tensor(mask)
