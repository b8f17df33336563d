"""The next token of every row, drawn as its own request asks: rows of one batch need nothing in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, StoppingCriteria

from nybble.generate.batching import Batch, Row
from nybble.serve.mailbox import Token

NO_NUMBERS = "the model's logits are infinite or NaN; float16 overflows where bfloat16 does not"


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws for the rows that sample, and leaves nothing else to generate's argmax; keeps log probabilities for those who ask.

    A draw is one number from the row's own generator, and the token at which the cumulated probability passes it (inverse
    transform sampling). In vocabulary order, so that the rounding by which batches differ moves a border and swaps nothing.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.logprobs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in which the drawn token is the largest."""
        for n in scores.isfinite().all(-1).logical_not().nonzero().flatten().tolist():
            if self.rows[n].answer.finish is None:
                self.rows[n].answer.fail(NO_NUMBERS)
        live = [n for n, row in enumerate(self.rows) if row.answer.finish is None]
        asked = any(self.rows[n].request.logprobs is not None for n in live)
        self.logprobs = scores.log_softmax(-1) if asked else None
        sampled = [n for n in live if self.rows[n].request.temperature > 0]
        if sampled:
            chosen = draw(scores[sampled], [self.rows[n] for n in sampled])
            scores = scores.clone()
            scores[sampled, chosen] = torch.inf
        return scores

    def tokens(self, ids: Sequence[int]) -> list[Token]:
        """What was chosen, with its log probability where that was asked for."""
        return [self._token(n, row, chosen) for n, (row, chosen) in enumerate(zip(self.rows, ids, strict=True))]

    def _token(self, n: int, row: Row, chosen: int) -> Token:
        count = row.request.logprobs
        if count is None or self.logprobs is None or row.answer.finish is not None:
            return Token(chosen)
        own = self.logprobs[n]
        best = own.topk(count) if count else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(chosen, float(own[chosen]), top)


class Steps(StoppingCriteria):  # type: ignore[misc]
    """Hands every new token to its row, and tells generate which rows go on."""

    def __init__(self, batch: Batch, draw: Draw) -> None:
        self.batch = batch
        self.draw = draw

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Which rows of (rows, tokens) are done."""
        done = self.batch.step(self.draw.tokens(input_ids[:, -1].tolist()))
        return torch.tensor(done, device=input_ids.device)


def draw(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """A token a row, (rows,), from logits (rows, vocabulary): temperature, then top_k, then top_p (Holtzman et al. 2020)."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype).unsqueeze(1)

    asked = [row.request for row in rows]
    logits = logits / column([request.temperature for request in asked])
    vocabulary = logits.shape[1]
    if any(request.top_k or request.top_p < 1 for request in asked):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        place = torch.arange(vocabulary, device=logits.device).expand_as(ordered)
        out = place >= column([request.top_k or vocabulary for request in asked])
        ordered = ordered.masked_fill(out, -torch.inf)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # what is likelier; the first token always stays
        nucleus = column([request.top_p for request in asked])
        out = out | ((before >= nucleus) & (nucleus < 1) & (place > 0))
        logits = logits.masked_fill(out.gather(1, order.argsort(-1)), -torch.inf)
    cumulated = logits.double().softmax(-1).cumsum(-1)
    drawn = torch.tensor([row.random.random() for row in rows], device=logits.device, dtype=torch.float64).unsqueeze(1)
    chosen = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=vocabulary - 1)
