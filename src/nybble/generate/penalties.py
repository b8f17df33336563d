"""Penalties and biases: what a request changes in the logits before a token is chosen.

Presence and frequency penalties are OpenAI's, which count the answer's tokens; the repetition penalty is that of CTRL (Keskar et
al. 2019), which looks at prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.generate.batching import ActiveRequest
from nybble.generate.request import Request


class LogitChanges:
    """The changes of one batch's rows; they follow the tokens on the device.

    Args:
        rows: the requests, all of whose tokens so far are known.
        vocabulary: the number of logits of a row.
        device: of the logits.
    """

    def __init__(self, rows: Sequence[ActiveRequest], vocabulary: int, device: torch.device) -> None:
        penalised = [n for n, row in enumerate(rows) if has_penalty(row.request)]
        self._rows = torch.tensor(penalised, device=device, dtype=torch.long)
        requests = [rows[n].request for n in penalised]
        options = [[each.presence_penalty, each.frequency_penalty, each.repetition_penalty] for each in requests]
        self._presence, self._frequency, self._repetition = (
            torch.tensor(options, device=device).view(-1, 3, 1).unbind(1)
        )
        self._answered = torch.zeros(len(penalised), vocabulary, device=device)
        """How often each token is in the answer."""
        self._seen = torch.zeros(len(penalised), vocabulary, dtype=torch.bool, device=device)
        """Whether each token is in prompt or answer."""
        for n, row in enumerate(rows[n] for n in penalised):
            answer = torch.tensor(row.answer_ids, device=device, dtype=torch.long)
            self._answered[n].index_add_(0, answer, torch.ones_like(answer, dtype=torch.float32))
            self._seen[n, torch.tensor(row.sequence, device=device)] = True
        biases = [(n, token, bias) for n, row in enumerate(rows) for token, bias in row.request.logit_bias]
        places = torch.tensor([[n, token] for n, token, _ in biases], dtype=torch.long).view(-1, 2)
        self._biased = places.to(device).unbind(1)
        self._bias = torch.tensor([bias for *_, bias in biases], dtype=torch.float32).to(device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changed logits, (rows, vocabulary); the given ones stay as they are."""
        changed = logits.clone()
        if len(self._rows):
            own = changed[self._rows]
            repeated = torch.where(own > 0, own / self._repetition, own * self._repetition)
            own = torch.where(self._seen, repeated, own)
            own -= self._frequency * self._answered + self._presence * (self._answered > 0)
            changed[self._rows] = own.to(changed.dtype)
        if len(self._bias):
            changed.index_put_(self._biased, self._bias.to(changed.dtype), accumulate=True)
        return changed

    def add(self, ids: torch.Tensor) -> None:
        """Each row's next token, (rows,)."""
        if len(self._rows):
            own = ids[self._rows].unsqueeze(1)
            self._answered.scatter_add_(1, own, torch.ones_like(own, dtype=torch.float32))
            self._seen.scatter_(1, own, True)


def has_penalty(request: Request) -> bool:
    """Whether the logits depend on the tokens so far by more than the model."""
    return bool(request.presence_penalty or request.frequency_penalty) or request.repetition_penalty != 1


def changes_logits(request: Request) -> bool:
    """Whether a request changes the logits."""
    return has_penalty(request) or bool(request.logit_bias)
