"""The next token of rows that come and go: what they ask for goes to the device only when other rows are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.generate.batching import ActiveRequest
from nybble.generate.request import NonFiniteLogitsError, Token
from nybble.generate.sampling import draw
from nybble.generate.seeds import seed_tensor, uniforms


class Sampler:
    """Draws a token a row by the seed contract, `nybble.generate.request`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[ActiveRequest] = []
        self._sampled: list[int] = []

    def sample(self, rows: Sequence[ActiveRequest], logits: torch.Tensor) -> list[Token]:
        """A token for each row; a row whose logits are not finite fails instead, and its token means nothing.

        Args:
            rows: whose positions are the lengths of their prompts and answers so far.
            logits: (rows, vocabulary) float32.
        """
        if list(rows) != self._rows:
            self._describe(rows)
        chosen = logits.argmax(-1)
        if self._sampled:
            positions = torch.tensor([len(rows[n].request.prompt) + len(rows[n].ids) for n in self._sampled])
            uniform = uniforms(self._seeds, positions.to(self._device))
            chosen[self._indices] = draw(logits[self._indices], self._temperature, uniform, self._filters)
        # One copy from the device: tokens, and whether the largest logit is a number (argmax finds NaN first).
        largest = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        ids, finite = torch.stack((chosen, largest.isfinite().to(chosen.dtype))).tolist()
        logprobs = logits.log_softmax(-1) if any(row.request.logprobs is not None for row in rows) else None
        for row, fine in zip(rows, finite, strict=True):
            if not fine:
                row.fail(NonFiniteLogitsError())
        return [_token(row, ids[n], None if logprobs is None else logprobs[n]) for n, row in enumerate(rows)]

    def _describe(self, rows: Sequence[ActiveRequest]) -> None:
        self._rows = list(rows)
        self._sampled = [n for n, row in enumerate(rows) if row.request.temperature > 0]
        asked = [rows[n].request for n in self._sampled]
        self._indices = torch.tensor(self._sampled, device=self._device, dtype=torch.long)
        self._temperature = torch.tensor([request.temperature for request in asked], device=self._device)
        self._seeds = seed_tensor([rows[n].seed for n in self._sampled], self._device)
        self._filters = None
        if any(request.top_k or request.top_p < 1 for request in asked):
            self._filters = (
                torch.tensor([min(request.top_k, 2**31) for request in asked], device=self._device),
                torch.tensor([request.top_p for request in asked], device=self._device),
            )


def _token(row: ActiveRequest, chosen: int, logprobs: torch.Tensor | None) -> Token:
    count = row.request.logprobs
    if count is None or logprobs is None or row.over:
        return Token(chosen)
    best = logprobs.topk(count) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), top)
