"""What a sweep is asked for, checked before anything is loaded."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from nybble.errors import RecipeError, RunError
from nybble.recipe import Recipe, absolute_paths
from nybble.run.folder import default_name
from nybble.sweep.space import SearchedRecipe, combinations

STUDY = "study.db"


@dataclass(frozen=True)
class SweepRequest:
    """What `nybble sweep` was asked for."""

    searched: SearchedRecipe
    trials: int
    folder: pathlib.Path

    @property
    def wanted(self) -> int:
        """How many trials there will be: no more than the space has combinations."""
        return min(self.trials, len(combinations(self.searched.space)) or self.trials)

    @property
    def recipe(self) -> Recipe:
        """What every trial has in common: the recipe with the first of each searched value."""
        return absolute_paths(self.searched.recipe(self.searched.first))


def sweep_request(searched: SearchedRecipe, trials: int) -> SweepRequest:
    """Check what was asked for, before anything is loaded.

    Raises:
        RecipeError: there is nothing to search, or nothing to compare trials by.
        RunError: its folder exists and is no sweep.
    """
    recipe = searched.recipe(searched.first)
    if not searched.space:
        raise RecipeError(
            "there is nothing to search: every option has one value",
            fix="a range or a list, as in train.learning_rate=1e-4..1e-3 lora.r=8,16,32",
        )
    if recipe.data.validation in (0, 0.0):
        raise RecipeError(
            "data.validation is 0, but trials are compared by their loss on held-out rows", fix="data.validation=0.05"
        )
    if recipe.train.processes > 1:
        raise RecipeError(
            f"train.processes is {recipe.train.processes}, but the trials of a sweep train in one process",
            fix="train.processes=1",
        )
    if recipe.export.to:
        raise RecipeError(f"export.to={','.join(recipe.export.to)}: trials are not exported", fix="export.to=[]")
    folder = default_folder(recipe)
    if folder.exists() and any(folder.iterdir()) and not (folder / STUDY).exists():
        raise RunError(f"{folder} exists already, and is no sweep", fix="out=ANOTHER")
    return SweepRequest(searched, trials, folder)


def default_folder(recipe: Recipe) -> pathlib.Path:
    """The folder that the recipe names, or runs/MODEL-DATA-sweep, which the same command continues."""
    if recipe.out is not None:
        return pathlib.Path(recipe.out)
    return pathlib.Path("runs") / f"{default_name(recipe)}-sweep"


def trial_folder(sweep_folder: pathlib.Path, number: int) -> pathlib.Path:
    """The run folder of a trial."""
    return sweep_folder / "trials" / f"{number:03}"
