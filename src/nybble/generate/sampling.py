"""Samples the next token of every row by its own request's options, which may differ within a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, StoppingCriteria

from nybble.generate.batching import ActiveRequest, GenerationBatch
from nybble.generate.request import NonFiniteLogitsError, Token
from nybble.generate.seeds import seed_tensor, uniforms


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Samples for the rows that are not greedy, so that generate's argmax picks the sampled token; keeps the log probabilities
    for the rows that want them.

    The options of the rows are copied to the device once per batch, so no token needs a copy to it.
    """

    def __init__(self, rows: Sequence[ActiveRequest], device: torch.device) -> None:
        self.rows = rows
        self.logprobs: torch.Tensor | None = None
        sampled = [n for n, row in enumerate(rows) if row.request.temperature > 0]
        requests = [rows[n].request for n in sampled]
        self.sampled = torch.tensor(sampled, device=device)
        self.temperature = torch.tensor([request.temperature for request in requests], device=device)
        self.top_k = torch.tensor([min(request.top_k, 2**31) for request in requests], device=device)
        self.top_p = torch.tensor([request.top_p for request in requests], device=device)
        self.filters = any(request.top_k or request.top_p < 1 for request in requests)
        self.seeds = seed_tensor([rows[n].seed for n in sampled], device)
        self.positions = torch.tensor([len(rows[n].sequence) for n in sampled], device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in which the sampled token has the largest."""
        for n in scores.amax(-1).isfinite().logical_not().nonzero().flatten().tolist():
            if not self.rows[n].ended:
                self.rows[n].fail(NonFiniteLogitsError())
        wanted = any(row.request.logprobs is not None for row in self.rows if not row.ended)
        self.logprobs = scores.log_softmax(-1) if wanted else None
        if len(self.sampled):
            uniform = uniforms(self.seeds, self.positions)
            filters = (self.top_k, self.top_p) if self.filters else None
            chosen = sample(scores[self.sampled], self.temperature, uniform, filters)
            scores = scores.clone()
            scores[self.sampled, chosen] = torch.inf
            self.positions = self.positions + 1
        return scores

    def tokens(self, ids: Sequence[int]) -> list[Token]:
        """The chosen tokens, with log probabilities for the rows that want them."""
        return [self._token(n, row, chosen) for n, (row, chosen) in enumerate(zip(self.rows, ids, strict=True))]

    def _token(self, n: int, row: ActiveRequest, chosen: int) -> Token:
        count = row.request.logprobs
        if count is None or self.logprobs is None or row.ended:
            return Token(chosen)
        logprobs = self.logprobs[n]
        best = logprobs.topk(count) if count else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)


class TokenDelivery(StoppingCriteria):  # type: ignore[misc]
    """Passes every new token to its row, and tells generate which rows are done."""

    def __init__(self, batch: GenerationBatch, sampler: Sampler) -> None:
        self.batch = batch
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """For each row of input_ids (rows, tokens), whether it is done."""
        done = self.batch.step(self.sampler.tokens(input_ids[:, -1].tolist()))
        return torch.tensor(done, device=input_ids.device)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
    filters: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One token per row, (rows,): where the cumulative probability passes the row's uniform number (inverse transform sampling).

    The probabilities are added in vocabulary order, so that rounding, which differs between batches, only moves the boundaries
    between tokens and never swaps tokens.

    Args:
        logits: (rows, vocabulary).
        temperature: (rows,), above zero.
        uniform: (rows,) float64 in [0, 1).
        filters: top_k (rows,), 0 for all, then top_p (rows,), 1 for all (Holtzman et al. 2020).
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
        before = share.cumsum(-1) - share  # the probability of all likelier tokens; the first token always stays
        out = out | ((before >= top_p) & (top_p < 1) & (rank > 0))
        logits = logits.masked_fill(out.gather(1, order.argsort(-1)), -torch.inf)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=vocabulary - 1)
