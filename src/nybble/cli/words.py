"""From the words of a command line to a recipe."""

from __future__ import annotations

import json
import pathlib
import re
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.errors import RecipeError

if TYPE_CHECKING:
    from nybble.recipe import Recipe

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
Config = Annotated[pathlib.Path | None, typer.Option("-c", "--config", help="A recipe; KEY=VALUE overrides it.")]


def train_recipe(
    words: list[str], config: pathlib.Path | None, resume: pathlib.Path | None, processes: int | None
) -> Recipe:
    """What to train: the resumed run's own, or MODEL, DATA and KEY=VALUE over a file."""
    overrides = _overrides(words, ("model.path", "data.path"))
    if resume is not None:
        if words or config is not None or processes is not None:
            raise typer.BadParameter("--resume goes on with the run's own recipe and takes no other option")
        from nybble.run import open_run

        return open_run(resume).recipe
    if processes is not None:
        overrides.append(f"train.processes={processes}")
    from nybble.recipe import load_recipe

    return load_recipe(config, overrides)


def data_recipe(words: list[str], config: pathlib.Path | None) -> Recipe:
    """What to look at: DATA, MODEL and KEY=VALUE over a file."""
    from nybble.recipe import load_recipe

    recipe = load_recipe(config, _overrides(words, ("data.path", "model.path")))
    if not recipe.data.path:
        raise RecipeError(
            "DATA is missing", fix="nybble data check DATA, a file, folder, pattern or Hub id; or -c recipe.yaml"
        )
    return recipe


def _overrides(words: list[str], places: tuple[str, str]) -> list[str]:
    """Words without a key in their places, and the others as they are."""
    named = [word for word in words if not OVERRIDE.match(word)]
    if len(named) > 2:
        names = " and ".join(place.split(".")[0].upper() for place in places)
        raise typer.BadParameter(f"at most {names}, then key=value; what is {named[2]!r}?")
    # in quotes: a value is YAML, to which the * of a pattern and the colon of a name would say something
    given = [f"{key}={json.dumps(word, ensure_ascii=False)}" for key, word in zip(places, named, strict=False)]
    return given + [word for word in words if OVERRIDE.match(word)]
