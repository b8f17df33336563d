"""Samples the next token of every row by its own request's options, which may differ within a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, StoppingCriteria

from nybble.generate.batching import ActiveRequest, GenerationBatch
from nybble.generate.request import NonFiniteLogitsError, Token
from nybble.generate.seeds import seed_tensor, uniforms


class RowSampler:
    """Samples one token for each row; the rows' options are copied to the device only when the rows change."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: list[ActiveRequest] = []
        self._sampled: list[int] = []

    def next_tokens(self, rows: Sequence[ActiveRequest], logits: torch.Tensor) -> list[Token]:
        """The next token of each row, with log probabilities for the rows that want them.

        A row whose logits are not finite fails; its token means nothing. So does that of a row that has ended.

        Args:
            rows: the requests; the token comes after their sequences.
            logits: (rows, vocabulary).
        """
        if list(rows) != self._rows:
            self._read_options(rows)
        chosen = logits.argmax(-1)
        if self._sampled:
            positions = [len(rows[n].request.prompt) + len(rows[n].answer_ids) for n in self._sampled]
            uniform = uniforms(self._seeds, torch.tensor(positions, device=self.device))
            chosen[self._indices] = sample(logits[self._indices], self._temperature, uniform, self._filters)
        # One copy from the device: the tokens, and whether the largest logit is finite (amax returns NaN where there is one).
        ids, finite = torch.stack((chosen, logits.amax(-1).isfinite().to(chosen.dtype))).tolist()
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite and not row.ended:
                row.fail(NonFiniteLogitsError())
        wanted = any(row.request.logprobs is not None for row in rows if not row.ended)
        logprobs = logits.log_softmax(-1) if wanted else None
        return [_token(row, ids[n], None if logprobs is None else logprobs[n]) for n, row in enumerate(rows)]

    def _read_options(self, rows: Sequence[ActiveRequest]) -> None:
        self._rows = list(rows)
        self._sampled = [n for n, row in enumerate(rows) if row.request.temperature > 0]
        requests = [rows[n].request for n in self._sampled]
        self._indices = torch.tensor(self._sampled, device=self.device, dtype=torch.long)
        self._temperature = torch.tensor([request.temperature for request in requests], device=self.device)
        self._seeds = seed_tensor([rows[n].seed for n in self._sampled], self.device)
        self._filters = None
        if any(request.top_k or request.top_p < 1 for request in requests):
            top_k = torch.tensor([min(request.top_k, 2**31) for request in requests], device=self.device)
            self._filters = top_k, torch.tensor([request.top_p for request in requests], device=self.device)


def _token(row: ActiveRequest, chosen: int, logprobs: torch.Tensor | None) -> Token:
    count = row.request.logprobs
    if count is None or logprobs is None or row.ended:
        return Token(chosen)
    best = logprobs.topk(count) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), top)


class BatchSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples inside generate, so that its argmax picks the sampled token."""

    def __init__(self, rows: Sequence[ActiveRequest], device: torch.device) -> None:
        self.rows, self.tokens = rows, list[Token]()
        self._sampler = RowSampler(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in which the sampled token has the largest."""
        self.tokens = self._sampler.next_tokens(self.rows, scores)
        chosen = torch.tensor([token.id for token in self.tokens], device=scores.device)
        return scores.scatter(1, chosen.unsqueeze(1), torch.inf)


class TokenDelivery(StoppingCriteria):  # type: ignore[misc]
    """Passes every new token to its row, and tells generate which rows are done."""

    def __init__(self, batch: GenerationBatch, sampler: BatchSampler) -> None:
        self.batch = batch
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """For each row of input_ids (rows, tokens), whether it is done."""
        return torch.tensor(self.batch.step(self.sampler.tokens), device=input_ids.device)


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
