"""The command `plan`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.app import Documented, app, cache_folder, silence_libraries
from nybble.cli.arguments import (
    TAKES_RECIPE_OPTIONS,
    Config,
    complete_argument,
    long_options,
    refuse_missing,
    train_recipe,
)
from nybble.errors import ModelError


@app.command(cls=Documented, context_settings=TAKES_RECIPE_OPTIONS)
def plan(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL DATA] [KEY=VALUE ...]",
            help="Base model (a folder, a Hub id, or a name such as llama-2-7b), data, and options of the recipe.",
            autocompletion=complete_argument,
        ),
    ] = None,
    config: Config = None,
    vram: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU, as in 12GB; auto: what is free. Finds the fastest way that fits."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run will take, before anything is downloaded: memory by item, disk, time, and what fits a card."""
    recipe = train_recipe(arguments or [], config, None, {"train.vram": vram}, long_options(context))
    if not recipe.model.path:
        raise ModelError("MODEL is missing", fix="nybble plan llama-2-7b, a folder, or a Hub id")
    from nybble.preflight.plan.card import find_card, limit_bytes
    from nybble.preflight.plan.make import check_positions, make_plan
    from nybble.preflight.plan.report import as_json as plan_json
    from nybble.preflight.plan.report import render
    from nybble.preflight.plan.sizes import sizes_of

    base = recipe.model.model_copy(update={"path": ""})  # `sizes_of` knows more names of bases
    refuse_missing(recipe.model_copy(update={"model": base}))
    card = find_card()
    limit = limit_bytes(recipe.train.vram, card)
    sizes = sizes_of(recipe.model.path, recipe.model.revision)
    check_positions(recipe, sizes.shape)
    facts = None
    if recipe.data.path:
        silence_libraries()
        from nybble.preflight.plan.rows import read_rows

        facts = read_rows(recipe, cache_folder(context))
    made = make_plan(recipe, sizes, limit=limit, card=card, facts=facts)
    if as_json:
        typer.echo(plan_json(made))
    else:
        render(made, Console())
    if made.verdict != "fits":
        raise typer.Exit(1)
