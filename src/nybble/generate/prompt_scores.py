"""Log probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nybble.generate.request import Token
from nybble.generate.sampling import LogProbabilities
from nybble.generate.transfers import to_device

ROWS = 64  # positions whose logits exist at once, as many as the decoder's largest step has: with 128,256 tokens 33 MB


def score_tokens(
    states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], ids: Sequence[int], likeliest: int
) -> list[Token] | None:
    """Tokens with their log probabilities, each given everything before it; waits for the device.

    Args:
        states: (positions, hidden), what the model has computed at the position before each token; there may be more.
        logits_of: logits, (positions, vocabulary), of such states.
        ids: of the tokens.
        likeliest: how many of the likeliest tokens to return with each.

    Returns:
        None where logits are infinite or NaN.
    """
    tokens: list[Token] = []
    for start in range(0, len(ids), ROWS):
        part = ids[start : start + ROWS]
        logits = logits_of(states[start : start + len(part)]).float()
        scores = LogProbabilities.of(logits, to_device(part, logits.device), [likeliest] * len(part))
        if not logits.amax(-1).isfinite().all():  # waits for the copies to the host, too
            return None
        tokens += scores.tokens(part)
    return tokens
