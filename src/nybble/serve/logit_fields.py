"""Fields of a request that change logits: penalties, min_p and logit_bias."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

MOST_BIASES = 1024  # each is stored with its row, in every step
STRONGEST_BIAS = 100.0

Penalty = Annotated[float, Field(ge=-2, le=2)]
MinP = Annotated[float, Field(ge=0, le=1)]
# Both bounds are far beyond any use; a logit divided by 1e-40 is infinite in float32.
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Biases as pairs of token id and bias, without those of 0."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES:,} tokens, not {len(value):,}")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and str(int(token)) == token):
            raise ValueError(f"{token[:20]!r} is not the id of a token, such as '50'")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= STRONGEST_BIAS:
            raise ValueError(f"the bias of token {token} must be a number from -100 to 100")
    return tuple((int(token), float(bias)) for token, bias in value.items() if bias)


LogitBias = Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases)]
