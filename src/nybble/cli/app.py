"""The Typer application, its global options, and what its commands share."""

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

# The order in which a person needs them, which is that of the help.
JOURNEY = ("doctor", "data", "plan", "train", "sweep", "eval", "chat", "export", "serve", "demo", "help")


class Program(TyperGroup):
    """The group of all commands; the program's own options go before the command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order of the journey."""
        return sorted(super().list_commands(ctx), key=JOURNEY.index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; returns its name, the command and its arguments.

        Raises:
            RecipeError: one of the program's options is among the arguments; the fix is the line to type.
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
    """A command whose options are the recipe's: its help ends with examples and the most used options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        from nybble.cli.keys import print_keys

        print_keys(Console(), ctx.info_name)


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
    provide_home(cache_option(context))


def cache_option(context: typer.Context) -> pathlib.Path | None:
    """The folder given by `--cache`, made absolute; None if the option was not given."""
    folder: pathlib.Path | None = context.find_root().obj
    return folder.absolute() if folder is not None else None


def cache_folder(context: typer.Context) -> pathlib.Path:
    """The folder given by `--cache`, or this user's default cache."""
    return cache_option(context) or default_cache()


@app.command("help")
def show_help(
    context: typer.Context,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]", help="Command to explain.")] = None,
) -> None:
    """Show this help, or a command's: nybble help train."""
    current = context.parent
    assert current is not None, "a command of the program"
    for argument in arguments or []:
        commands = getattr(current.command, "commands", {})
        if argument not in commands:
            known = f"; the commands are {', '.join(commands)}" if commands else ""
            raise RecipeError(f"there is no command {' '.join(arguments or [])}{known}", fix="nybble help")
        current = typer.Context(commands[argument], parent=current, info_name=argument)
    typer.echo(current.get_help())


def silence_libraries() -> None:
    """Turn off the libraries' own warnings, logs and progress bars: nybble reports what the user needs to know."""
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
