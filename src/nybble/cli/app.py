"""The program, and what its commands have in common."""

from __future__ import annotations

import logging
import pathlib
import warnings
from typing import Annotated

import typer

from nybble import __version__
from nybble.places import default_cache, lend_home

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QLoRA fine-tuning of LLaMA 2 and its kin: from a fresh machine to a model that answers.",
)
Folder = Annotated[pathlib.Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    cache: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder of quantised bases and tokenised data; else $XDG_CACHE_HOME/nybble or ~/.cache/nybble."
        ),
    ] = None,
) -> None:
    if version:
        typer.echo(f"nybble {__version__}")
        raise typer.Exit
    context.obj = cache
    lend_home(asked_cache(context))


def asked_cache(context: typer.Context) -> pathlib.Path | None:
    """What `--cache` names."""
    asked: pathlib.Path | None = context.find_root().obj
    return asked.absolute() if asked is not None else None


def cache_folder(context: typer.Context) -> pathlib.Path:
    """What `--cache` names, or this user's own."""
    return asked_cache(context) or default_cache()


def quiet() -> None:
    """Libraries talk about themselves; what a person needs to know is said by nybble."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.autograd._functions",
        "transformers",
        "accelerate",
        "datasets",
        "torch.distributed",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
