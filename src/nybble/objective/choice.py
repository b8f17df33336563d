"""The objective that a recipe names."""

from __future__ import annotations

from typing import Literal

from nybble.objective.kto import Kto
from nybble.objective.objective import Objective
from nybble.objective.preference import PairObjective
from nybble.objective.supervised import Supervised
from nybble.recipe import PreferenceOptions

ObjectiveName = Literal["supervised", "dpo", "orpo", "kto", "simpo"]


def choose_objective(name: ObjectiveName, options: PreferenceOptions) -> Objective:
    """The objective of this name; of its options those that it uses."""
    if name == "supervised":
        return Supervised()
    beta = options.strength(name)
    if name == "kto":
        return Kto(beta, options.desirable_weight, options.undesirable_weight)
    return PairObjective(name, beta, options.gamma)
