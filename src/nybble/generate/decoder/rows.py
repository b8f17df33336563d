"""Requests that the decoder is answering, and how they fail."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from nybble.generate.batching import ActiveRequest
from nybble.generate.decoder.lookup import PromptLookup
from nybble.generate.decoder.part_scores import PartScores
from nybble.generate.decoder.steps import CacheSlot
from nybble.generate.lost import why_card_is_lost
from nybble.generate.request import GenerationError, NonFiniteLogitsError, Token
from nybble.generate.sampling import SampledTokens

log = logging.getLogger("nybble.generate")


@dataclass(eq=False)
class DecodedRow:
    """A request being answered: its slot in the cache, and its entry in the table of last tokens."""

    active: ActiveRequest
    slot: CacheSlot
    entry: int
    cached: int
    """Tokens of the prompt that the slot had from the beginning."""
    lookup: PromptLookup | None = None
    """None where drafts are not wanted, or the sampler must know each token before the next."""
    prompt: list[Token] = field(default_factory=list)
    """The tokens of the prompt that have been computed, if the request asks for them."""

    @property
    def rest_of_prompt(self) -> Sequence[int]:
        """Tokens of the prompt that are still to be computed."""
        return self.active.request.prompt[self.slot.length :]

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is computed, and its answer may have more tokens than those that were computed."""
        request = self.active.request
        answer = self.slot.length - len(request.prompt) + 1
        return not self.active.ended and 1 <= answer < request.max_tokens

    def receive(self, token: Token | None) -> None:
        """Hand over a token, or fail without one."""
        self.active.receive(token)
        if self.lookup is not None and token is not None:
            self.lookup.add(token.id)

    def draft(self, most: int) -> list[int]:
        """Tokens that may follow those that are known, at most so many and none beyond the answer's limit."""
        return [] if self.lookup is None else self.lookup.draft(min(most, self.active.tokens_left - 1))


@dataclass(frozen=True)
class Unread:
    """Tokens that the device was asked for, and the rows that they belong to."""

    rows: Sequence[DecodedRow]
    sampled: SampledTokens


def add_scores(rows: Sequence[DecodedRow], scores: PartScores) -> None:
    """Add what was computed of prompts that are asked for; one without finite logits fails."""
    for row, tokens in zip(rows, scores.tokens, strict=True):
        request = row.active.request
        if tokens is None:
            row.active.fail(NonFiniteLogitsError())
        elif request.prompt_logprobs is not None:
            row.prompt += tokens if row.prompt else [Token(request.prompt[0]), *tokens]


def fail_unless_lost(rows: Sequence[DecodedRow], error: Exception) -> None:
    """Fail rows whose computation failed; an error that leaves the device unusable goes on.

    Raises:
        AcceleratorError: of torch: CUDA answers every later call with the same error.
    """
    if why_card_is_lost(error) is not None:
        raise error
    log.error("the model failed for %d rows", len(rows), exc_info=error)
    fail(rows, "the model failed; the log says why", error)


def fail(rows: Sequence[DecodedRow], what: str, cause: Exception) -> None:
    for row in rows:
        if row.active.ended:
            continue
        error = GenerationError(what)
        error.__cause__ = cause.with_traceback(None)  # which would keep what the forward pass had allocated
        row.active.fail(error)
