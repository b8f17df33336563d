"""The recipe's section `preference`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.recipe.options.section import Options


class PreferenceOptions(Options):
    """Training on preferences: what train.objective=dpo, orpo, kto and simpo use besides `train`."""

    beta: float | None = Field(default=None, gt=0)
    """Strength: dpo and kto: how far from the reference; orpo: weight of the odds; simpo: scale. Default 0.1, for simpo 2."""
    gamma: float = Field(default=1.0, ge=0)
    """simpo: the margin by which the chosen answer's reward should be higher."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of good answers; with more bad ones than good, raise it until both count about the same."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of bad answers."""
    reference: Literal["kept", "live"] = "kept"
    """dpo and kto: the reference's likelihoods, computed once before the first step and kept in the cache, or in every step."""

    def strength(self, objective: str) -> float:
        """The option beta, or its default for an objective."""
        return self.beta if self.beta is not None else 2.0 if objective == "simpo" else 0.1
