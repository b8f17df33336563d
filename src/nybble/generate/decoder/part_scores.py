"""Log probabilities of the prompts in one pass of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nybble.generate.prompt_scores import score_tokens
from nybble.generate.request import Request, Token


class PartScores:
    """Scores of some prompts' parts: of each token that follows one of a part. See `nybble.generate.decoder.steps.Visit`.

    Args:
        requests: only those with `prompt_logprobs` are scored.
        starts: where each part begins in its prompt.
        parts: the tokens of each.
    """

    def __init__(self, requests: Sequence[Request], starts: Sequence[int], parts: Sequence[Sequence[int]]) -> None:
        self._requests, self._starts, self._lengths = requests, starts, [len(part) for part in parts]
        self.tokens: list[list[Token] | None] = [[] for _ in parts]
        """For each part; None where the model's logits are not finite."""

    def __call__(self, states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Compute them."""
        for n, (request, own) in enumerate(zip(self._requests, states.split(self._lengths), strict=True)):
            if request.prompt_logprobs is not None:
                first = self._starts[n] + 1
                following = request.prompt[first : first + self._lengths[n]]
                self.tokens[n] = score_tokens(own, logits_of, following, request.prompt_logprobs)
