"""Draws tokens from logits: temperature, the three truncations, and inverse transform sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.generate.request import Request


@dataclass(frozen=True)
class Distribution:
    """The options of rows that are sampled, each (rows,)."""

    temperature: torch.Tensor
    """Above zero."""
    min_p: torch.Tensor | None
    """0 for all tokens; None where no row uses it."""
    nucleus: tuple[torch.Tensor, torch.Tensor] | None
    """top_k, 0 for all tokens, and top_p, 1 for all; None where no row uses either."""

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Distribution:
        """The options of these requests."""

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        min_p = nucleus = None
        if any(request.min_p for request in requests):
            min_p = column([request.min_p for request in requests])
        if any(request.top_k or request.top_p < 1 for request in requests):
            top_k = torch.tensor([min(request.top_k, 2**31) for request in requests], device=device)
            nucleus = top_k, column([request.top_p for request in requests])
        return cls(column([request.temperature for request in requests]), min_p, nucleus)

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """One token per row, (rows,), by inverse transform: where the cumulative probability passes the row's uniform number.

        The probabilities are added in vocabulary order, so that rounding, which differs between batches, only moves the
        boundaries between tokens and never swaps tokens.

        Args:
            logits: (rows, vocabulary).
            uniform: (rows,) float64 in [0, 1).
        """
        logits = logits / self.temperature.to(logits.dtype).unsqueeze(1)
        if self.nucleus is not None:
            logits = _keep_nucleus(logits, *self.nucleus)
        if self.min_p is not None:
            least = logits.amax(-1) + self.min_p.log().to(logits.dtype)
            logits = logits.masked_fill(logits < least.unsqueeze(1), -torch.inf)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
        return chosen.clamp(max=logits.shape[1] - 1)


def _keep_nucleus(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Logits with -inf for tokens outside the top_k likeliest and the nucleus of top_p (Holtzman et al. 2020)."""
    vocabulary = logits.shape[1]
    top_k, top_p = top_k.unsqueeze(1), top_p.unsqueeze(1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=logits.device).expand_as(ordered)
    out = rank >= torch.where(top_k == 0, vocabulary, top_k)
    ordered = ordered.masked_fill(out, -torch.inf)
    share = ordered.softmax(-1)
    before = share.cumsum(-1) - share  # the probability of all likelier tokens; the first token always stays
    out = out | ((before >= top_p) & (top_p < 1) & (rank > 0))
    return logits.masked_fill(out.gather(1, order.argsort(-1)), -torch.inf)
