"""The next token of every row, drawn as its own request asks: rows of one batch need nothing in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, StoppingCriteria

from nybble.generate.batching import ActiveRequest, GenerationBatch
from nybble.generate.request import NonFiniteLogitsError, Token
from nybble.generate.seeds import seed_tensor, uniforms


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws for the rows that sample, and leaves nothing else to generate's argmax; keeps log probabilities for those who ask.

    What the rows ask for goes to the device once a batch; each token then costs no copy to it.
    """

    def __init__(self, rows: Sequence[ActiveRequest], device: torch.device) -> None:
        self.rows = rows
        self.logprobs: torch.Tensor | None = None
        sampled = [n for n, row in enumerate(rows) if row.request.temperature > 0]
        asked = [rows[n].request for n in sampled]
        self.sampled = torch.tensor(sampled, device=device)
        self.temperature = torch.tensor([request.temperature for request in asked], device=device)
        self.top_k = torch.tensor([min(request.top_k, 2**31) for request in asked], device=device)
        self.top_p = torch.tensor([request.top_p for request in asked], device=device)
        self.filters = any(request.top_k or request.top_p < 1 for request in asked)
        self.seeds = seed_tensor([rows[n].seed for n in sampled], device)
        self.positions = torch.tensor([len(rows[n].prompt) for n in sampled], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in which the drawn token is the largest."""
        for n in scores.amax(-1).isfinite().logical_not().nonzero().flatten().tolist():
            if not self.rows[n].over:
                self.rows[n].fail(NonFiniteLogitsError())
        asked = any(row.request.logprobs is not None for row in self.rows if not row.over)
        self.logprobs = scores.log_softmax(-1) if asked else None
        if len(self.sampled):
            uniform = uniforms(self.seeds, self.positions)
            filters = (self.top_k, self.top_p) if self.filters else None
            chosen = draw(scores[self.sampled], self.temperature, uniform, filters)
            scores = scores.clone()
            scores[self.sampled, chosen] = torch.inf
            self.positions = self.positions + 1
        return scores

    def tokens(self, ids: Sequence[int]) -> list[Token]:
        """What was chosen, with its log probability where that was asked for."""
        return [self._token(n, row, chosen) for n, (row, chosen) in enumerate(zip(self.rows, ids, strict=True))]

    def _token(self, n: int, row: ActiveRequest, chosen: int) -> Token:
        count = row.request.logprobs
        if count is None or self.logprobs is None or row.over:
            return Token(chosen)
        own = self.logprobs[n]
        best = own.topk(count) if count else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(chosen, float(own[chosen]), top)


class Steps(StoppingCriteria):  # type: ignore[misc]
    """Hands every new token to its row, and tells generate which rows go on."""

    def __init__(self, batch: GenerationBatch, draw: Draw) -> None:
        self.batch = batch
        self.draw = draw

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Which rows of (rows, tokens) are done."""
        done = self.batch.step(self.draw.tokens(input_ids[:, -1].tolist()))
        return torch.tensor(done, device=input_ids.device)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
    filters: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """A token a row, (rows,): the one at which the cumulated probability passes the row's uniform number (inverse transform).

    In vocabulary order, so that the rounding by which batches differ moves a border and swaps nothing.

    Args:
        logits: (rows, vocabulary).
        temperature: (rows,), above zero.
        uniform: (rows,) float64 of [0, 1).
        filters: top_k (rows,), 0 for all, and then top_p (rows,), 1 for all (Holtzman et al. 2020).
    """
    logits = logits / temperature.to(logits.dtype).unsqueeze(1)
    vocabulary = logits.shape[1]
    if filters is not None:
        top_k, top_p = (column.unsqueeze(1) for column in filters)
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocabulary, device=logits.device).expand_as(ordered)
        out = rank >= torch.where(top_k == 0, vocabulary, top_k)
        ordered = ordered.masked_fill(out, -torch.inf)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # what is likelier; the first token always stays
        out = out | ((before >= top_p) & (top_p < 1) & (rank > 0))
        logits = logits.masked_fill(out.gather(1, order.argsort(-1)), -torch.inf)
    cumulated = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulated, uniform.unsqueeze(1) * cumulated[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=vocabulary - 1)
