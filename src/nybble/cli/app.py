"""The program, and what its commands have in common."""

from __future__ import annotations

import logging
import pathlib
import shlex
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from nybble.errors import RecipeError
from nybble.files.paths import default_cache, provide_home
from nybble.version import __version__


class Program(TyperGroup):
    """All commands; the options of the program itself go before them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; returns its name, itself and its arguments.

        Raises:
            RecipeError: one of the program's options is among these, with the line to type.
        """
        name, command, arguments = super().resolve_command(ctx, args)
        flags = {option: parameter for parameter in self.params for option in parameter.opts}
        for position, argument in enumerate(arguments):
            option, equals, _ = argument.partition("=")
            if option in flags and not ctx.resilient_parsing:
                end = position + (1 if equals or getattr(flags[option], "is_flag", False) else 2)
                line = ["nybble", *arguments[position:end], str(name), *arguments[:position], *arguments[end:]]
                raise RecipeError(f"{option} goes before the command", fix=shlex.join(line))
        return name, command, arguments


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="QLoRA fine-tuning of Llama 2 and other Llama-architecture models: from a clean machine to a working model.",
)
Folder = Annotated[pathlib.Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")]


class Documented(TyperCommand):
    """A command whose options are the recipe's: its help ends with examples and with the keys that are used most."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        from nybble.cli.keys import tell_keys

        tell_keys(Console())


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    cache: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder for quantised bases and tokenised data; default: nybble in $XDG_CACHE_HOME or ~/.cache."
        ),
    ] = None,
) -> None:
    if version:
        typer.echo(f"nybble {__version__}")
        raise typer.Exit
    context.obj = cache
    provide_home(asked_cache(context))


def asked_cache(context: typer.Context) -> pathlib.Path | None:
    """What `--cache` names."""
    asked: pathlib.Path | None = context.find_root().obj
    return asked.absolute() if asked is not None else None


def cache_folder(context: typer.Context) -> pathlib.Path:
    """What `--cache` names, or this user's own."""
    return asked_cache(context) or default_cache()


@app.command("help")
def show_help(
    context: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]", help="Command to explain.")] = None,
) -> None:
    """Show this help, or a command's: nybble help train."""
    here = context.parent
    assert here is not None, "a command of the program"
    for argument in arguments or []:
        command = getattr(here.command, "commands", {}).get(argument)
        if command is None:
            there = ", ".join(getattr(here.command, "commands", {}))
            known = f"; the commands are {there}" if there else ""
            raise RecipeError(f"there is no command {' '.join(arguments or [])}{known}", fix="nybble help")
        here = typer.Context(command, parent=here, info_name=argument)
    typer.echo(here.get_help())


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
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
