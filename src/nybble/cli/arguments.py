"""From command-line arguments to a recipe."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.errors import DataError, ModelError, NybbleError, RecipeError

if TYPE_CHECKING:
    from nybble.recipe import Recipe

Config = Annotated[pathlib.Path | None, typer.Option("-c", "--config", help="A recipe; KEY=VALUE overrides it.")]
TAKES_RECIPE_OPTIONS = {"ignore_unknown_options": True}  # `--epochs 2` is read as train.epochs=2


def train_recipe(
    arguments: list[str],
    config: pathlib.Path | None,
    resume: pathlib.Path | None,
    given: Mapping[str, Any],
    command_options: Sequence[str] = (),
) -> Recipe:
    """The recipe to train: the resumed run's own, or a file overridden by MODEL, DATA and KEY=VALUE.

    Args:
        arguments: MODEL, DATA and KEY=VALUE.
        config: the file.
        resume: the run to be resumed.
        given: options of the recipe that the command has under names of its own; None where one was not given.
        command_options: the names of the command's own options.
    """
    options = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        if arguments or config is not None or options.keys() - {"train.processes"}:
            raise RecipeError(
                "--resume uses the run's own recipe and takes no other option than --processes",
                fix=f"nybble train --resume {resume}",
            )
        from nybble.run.folder import open_run
        from nybble.run.split import on_processes

        return on_processes(open_run(resume), given["train.processes"]).recipe
    extra = [f"{name}={value}" for name, value in options.items()]
    return _recipe(arguments, config, ("model.path", "data.path"), command_options, extra)


def data_recipe(arguments: list[str], config: pathlib.Path | None, command_options: Sequence[str] = ()) -> Recipe:
    """The recipe whose data is examined: a file overridden by DATA, MODEL and KEY=VALUE."""
    recipe = _recipe(arguments, config, ("data.path", "model.path"), command_options)
    if not recipe.data.path:
        raise RecipeError(
            "DATA is missing", fix="nybble data check DATA, a file, folder, pattern or Hub id; or -c recipe.yaml"
        )
    return recipe


def long_options(context: typer.Context) -> list[str]:
    """The names of a command's own options, such as --config."""
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def complete_argument(incomplete: str) -> list[str]:
    """The completions of a partly typed argument: KEY= of an option, KEY=VALUE, a file or a folder."""
    from nybble.recipe import option_names
    from nybble.recipe.values import choices, example, kinds_of

    key, equals, typed = incomplete.partition("=")
    if equals:
        kinds = kinds_of(key) or ()
        values = [*choices(kinds), *(["true", "false"] if bool in kinds else [])]
        return [f"{key}={value}" for value in values if value.startswith(typed)] or [
            f"{key}={name}" for name in _paths(typed)
        ]
    names = [name for name in option_names() if incomplete and name.startswith(incomplete)]
    # A shell puts a space after the only candidate, but the value must follow without one.
    examples = [example(name) for name in names] if len(names) == 1 else []
    return [*(f"{name}=" for name in names), *examples, *_paths(incomplete)]


def _paths(typed: str) -> list[str]:
    folder = os.path.dirname(typed)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    shown = [entry for entry in entries if not entry.name.startswith(".") or os.path.basename(typed).startswith(".")]
    names = [os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "") for entry in shown]
    return [name for name in names if name.startswith(typed)]


def refuse_missing(recipe: Recipe) -> None:
    """Refuse files and folders that do not exist, before anything is loaded.

    Raises:
        ModelError, DataError: what is missing.
    """
    model, data = recipe.model.path, recipe.data
    if model and not os.path.exists(model) and (_must_be_path(model) or "/" not in model):
        raise _missing(ModelError, f"there is no folder {model}, and it is not a Hub id (owner/name)", model)
    if recipe.adapter is not None and not os.path.exists(recipe.adapter):
        raise _missing(ModelError, f"there is no adapter in {recipe.adapter}: no such folder", recipe.adapter)
    rows = [*data.names, *([data.validation] if isinstance(data.validation, str) else [])]
    for name in rows:
        path = os.path.expanduser(name)
        is_file = _must_be_path(name) or pathlib.Path(name.removesuffix(".gz")).suffix.lower() in SUFFIXES
        if is_file and not set(name) & set("*?[") and not os.path.lexists(path):
            raise _missing(DataError, f"there is no file {path}", path)
    if data.template.endswith(".jinja") and not os.path.exists(os.path.expanduser(data.template)):
        raise _missing(DataError, f"there is no template {data.template}", data.template)


SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


def _must_be_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _missing(kind: type[NybbleError], what: str, path: str) -> NybbleError:
    return kind(what, fix=f"ls {os.path.dirname(path) or '.'}")


def _recipe(
    arguments: list[str],
    config: pathlib.Path | None,
    targets: tuple[str, str],
    command_options: Sequence[str],
    extra: Sequence[str] = (),
) -> Recipe:
    from nybble.cli.flags import sort_arguments
    from nybble.recipe import load_recipe

    texts, options = sort_arguments(arguments, targets, command_options)
    return load_recipe(config, [*options, *extra], texts=texts)
