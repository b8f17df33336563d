"""The command `sweep`: many short trainings on one base, or one that finds the learning rate."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nybble.cli.app import Documented, app, cache_folder, silence_libraries
from nybble.cli.arguments import TAKES_RECIPE_OPTIONS, Config, complete_argument, long_options, refuse_missing
from nybble.cli.extras import load_sweep, make_harness
from nybble.errors import RecipeError

if TYPE_CHECKING:
    from nybble.recipe import Recipe


@app.command(cls=Documented, context_settings=TAKES_RECIPE_OPTIONS)
def sweep(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL DATA] [KEY=VALUE ...]",
            help="Base model, data, and options of the recipe; a range a..b or a list a,b,c is searched.",
            autocompletion=complete_argument,
        ),
    ] = None,
    config: Config = None,
    trials: Annotated[
        int, typer.Option(help="Trainings; the same command continues a sweep up to so many.", min=1)
    ] = 12,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only suggest a learning rate, by one short run with a rising one.")
    ] = False,
) -> None:
    """Find settings by their held-out loss: nybble sweep -c recipe.yaml train.learning_rate=1e-4..1e-3 lora.r=8,16,32."""
    from nybble.cli.flags import sort_arguments
    from nybble.sweep.space import read_space

    texts, words = sort_arguments(arguments or [], ("model.path", "data.path"), long_options(context))
    searched = read_space(words, config, texts)
    recipe = searched.recipe(searched.first)
    for name, path in (("MODEL", recipe.model.path), ("DATA", recipe.data.path)):
        if not path:
            raise RecipeError(f"{name} is missing", fix="nybble sweep MODEL DATA, or -c recipe.yaml")
    refuse_missing(recipe)
    cache = cache_folder(context)
    if find_lr:
        if searched.space:
            raise RecipeError(
                f"--find-lr searches the learning rate alone, not {', '.join(searched.space)}", fix="one value each"
            )
        _find_rate(recipe, cache)
        return
    from nybble.sweep.request import sweep_request

    request = sweep_request(searched, trials)
    silence_libraries()
    run_sweep = load_sweep()
    tasks, rows = recipe.train.eval_tasks, recipe.train.eval_data
    folder = pathlib.Path(rows) if rows is not None else None
    harness = make_harness(tasks, folder, recipe.train.eval_limit, recipe.train.micro_batch) if tasks else None
    try:
        run_sweep(request, Console(), cache, harness)
    except KeyboardInterrupt:
        Console().print("stopped   the same command continues the sweep; it starts this trial again", highlight=False)
        raise typer.Exit(130) from None


def _find_rate(recipe: Recipe, cache: pathlib.Path) -> None:
    """Print a suggested learning rate, and write its curve."""
    silence_libraries()
    from nybble.training.train import find_rate

    try:
        find_rate(recipe, console=Console(), cache=cache)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
