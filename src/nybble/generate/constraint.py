"""What restricts an answer to a grammar: which tokens may come next. The grammars themselves are not known here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy
import numpy.typing
import torch

from nybble.generate.request import GenerationError, Request

WORD = 32  # bits of a mask's words
Mask = numpy.typing.NDArray[numpy.uint32]
"""(words,)"""


class Constraint(Protocol):
    """The state of one answer. For one thread."""

    error: str
    """Why it cannot go on; empty while it can."""

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next; after an error, any.

        Args:
            mask: a bit for each token; the first is the lowest of the first word.
        """

    def take(self, token_id: int) -> None:
        """The next token of the answer, which does not end it."""


Constrain = Callable[[Request], Constraint]
"""Makes the constraint of a request with a grammar. Raises a GenerationError."""


class GrammarError(GenerationError):
    """A grammar that cannot be followed."""


def mask_words(vocabulary: int) -> int:
    """Words of a mask."""
    return -(-vocabulary // WORD)


class ConstrainedRows:
    """The rows of a batch that follow a grammar.

    Args:
        constraints: of all rows of the batch; None for those without.
        device: of the logits.
    """

    def __init__(self, constraints: Sequence[Constraint | None], device: torch.device) -> None:
        own = [(n, each) for n, each in enumerate(constraints) if each is not None]
        self._constraints = [each for _, each in own]
        self._rows = torch.tensor([n for n, _ in own], device=device)
        self._bits = torch.arange(WORD, device=device, dtype=torch.int32)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits, (rows, vocabulary), with -inf for what may not come next; the given ones stay as they are.

        The masks are computed while a GPU still computes the logits.
        """
        vocabulary = logits.shape[1]
        masks = torch.zeros(
            len(self._constraints), mask_words(vocabulary), dtype=torch.int32, pin_memory=logits.is_cuda
        )
        for constraint, mask in zip(self._constraints, masks.numpy().view(numpy.uint32), strict=True):
            constraint.fill(mask)
        words = masks.to(logits.device, non_blocking=True).unsqueeze(2)
        allowed = ((words >> self._bits) & 1).flatten(1)[:, :vocabulary].bool()
        changed = logits.clone()
        changed[self._rows] = changed[self._rows].masked_fill(~allowed, -torch.inf)
        return changed
