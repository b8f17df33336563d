"""Samples the next token of every row by its own request's options, which may differ within a batch; all of it on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria

from nybble.generate.batching import ActiveRequest, GenerationBatch
from nybble.generate.constraint import ConstrainedRows
from nybble.generate.draw import Distribution
from nybble.generate.penalties import LogitChanges, changes_logits
from nybble.generate.request import Token
from nybble.generate.seeds import uniforms
from nybble.generate.transfers import to_device, to_host


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that a batch's rows were given, which the device may still be computing."""

    ids: torch.Tensor
    """(rows,) int64, on the device"""
    _facts: torch.Tensor
    """On the host, (2, rows): ids, and whether the row's logits are finite."""
    _logprobs: LogProbabilities | None
    _ready: torch.cuda.Event | None
    """Recorded behind the copies to the host; None on a CPU."""

    def read(self) -> list[Token | None]:
        """The tokens, None where the model's logits are not finite; waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        ids, finite = self._facts.tolist()
        tokens = [Token(token) for token in ids] if self._logprobs is None else self._logprobs.tokens(ids)
        return [token if good else None for token, good in zip(tokens, finite, strict=True)]


@dataclass(frozen=True)
class LogProbabilities:
    """Log probabilities of chosen and of the likeliest tokens, on the host."""

    counts: Sequence[int | None]
    """How many of the likeliest each row wants; None for no log probability at all."""
    chosen: torch.Tensor
    """(rows,)"""
    top: tuple[torch.Tensor, torch.Tensor]
    """(rows, most wanted): values and ids"""

    @classmethod
    def of(cls, logits: torch.Tensor, ids: torch.Tensor, counts: Sequence[int | None]) -> LogProbabilities:
        """Of logits (rows, vocabulary) and chosen ids (rows,); their copies to the host may still be under way."""
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(max(count or 0 for count in counts))
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
        return cls(counts, to_host(chosen), (to_host(best.values), to_host(best.indices)))

    def tokens(self, ids: Sequence[int]) -> list[Token]:
        """The chosen tokens."""
        chosen, values, indices = (each.tolist() for each in (self.chosen, *self.top))
        return [
            Token(token)
            if count is None
            else Token(token, chosen[n], tuple(zip(indices[n][:count], values[n][:count], strict=True)))
            for n, (token, count) in enumerate(zip(ids, self.counts, strict=True))
        ]


class RowSampler:
    """Samples one token for each row; the rows' options are copied to the device only when the rows change."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: list[ActiveRequest] = []
        self._sampled: list[int] = []
        self._changes: LogitChanges | None = None
        self._constrained: ConstrainedRows | None = None
        self._counts: list[int | None] = []

    def sample(self, rows: Sequence[ActiveRequest], positions: Sequence[int], logits: torch.Tensor) -> SampledTokens:
        """The next token of each row, with log probabilities for the rows that want them.

        Args:
            rows: the requests. Where one has a grammar, all of its tokens so far are known; where one has penalties, they are
                known if the rows are other than those of the call before.
            positions: of the new tokens in their sequences.
            logits: (rows, vocabulary).
        """
        if list(rows) != self._rows:
            self._read_options(rows, logits.shape[1])
        changed = logits if self._changes is None else self._changes.apply(logits)
        if self._constrained is not None:
            changed = self._constrained.apply(changed)
        chosen = changed.argmax(-1)
        if self._sampled:
            numbers = uniforms([rows[n].seed for n in self._sampled], [positions[n] for n in self._sampled])
            uniform = to_device(numbers.tolist(), self.device, torch.float64)
            chosen[self._indices] = self._distribution.draw(changed[self._indices], uniform)
        if self._changes is not None:
            self._changes.add(chosen)
        # amax returns NaN where there is one.
        facts = to_host(torch.stack((chosen, logits.amax(-1).isfinite().to(chosen.dtype))))
        logprobs = None
        if any(count is not None for count in self._counts):
            logprobs = LogProbabilities.of(logits, chosen, self._counts)
        return SampledTokens(chosen, facts, logprobs, _recorded_event(self.device))

    def _read_options(self, rows: Sequence[ActiveRequest], vocabulary: int) -> None:
        self._rows = list(rows)
        self._counts = [row.request.logprobs for row in rows]
        self._sampled = [n for n, row in enumerate(rows) if row.request.temperature > 0]
        self._indices = to_device(self._sampled, self.device)
        self._distribution = Distribution.of([rows[n].request for n in self._sampled], self.device)
        self._changes = None
        if any(changes_logits(row.request) for row in rows):
            self._changes = LogitChanges(rows, vocabulary, self.device)
        self._constrained = None
        if any(row.constraint is not None for row in rows):
            self._constrained = ConstrainedRows([row.constraint for row in rows])


class BatchSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples inside generate, so that its argmax picks the sampled token."""

    def __init__(self, rows: Sequence[ActiveRequest], device: torch.device) -> None:
        self.rows, self.tokens = rows, list[Token | None]()
        self._sampler = RowSampler(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in which the sampled token has the largest."""
        positions = [len(row.request.prompt) + len(row.answer_ids) for row in self.rows]
        sampled = self._sampler.sample(self.rows, positions, scores)
        self.tokens = sampled.read()
        return scores.scatter(1, sampled.ids.unsqueeze(1), torch.inf)


class TokenDelivery(StoppingCriteria):  # type: ignore[misc]
    """Passes every new token to its row, and tells generate which rows are done."""

    def __init__(self, batch: GenerationBatch, sampler: BatchSampler) -> None:
        self.batch = batch
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """For each row of input_ids (rows, tokens), whether it is done."""
        return torch.tensor(self.batch.step(self.sampler.tokens), device=input_ids.device)


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
