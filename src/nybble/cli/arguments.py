"""From the words of a command line to a recipe."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.errors import DataError, ModelError, NybbleError, RecipeError

if TYPE_CHECKING:
    from nybble.recipe import Recipe

Config = Annotated[pathlib.Path | None, typer.Option("-c", "--config", help="A recipe; KEY=VALUE overrides it.")]
LOOSE = {"ignore_unknown_options": True}  # `--epochs 2` is read as train.epochs=2


def train_recipe(
    words: list[str],
    config: pathlib.Path | None,
    resume: pathlib.Path | None,
    processes: int | None,
    own: Sequence[str] = (),
) -> Recipe:
    """What to train: the resumed run's own, or MODEL, DATA and KEY=VALUE over a file."""
    if resume is not None:
        if words or config is not None or processes is not None:
            raise RecipeError(
                "--resume uses the run's own recipe and takes no other options",
                fix=f"nybble train --resume {resume}",
            )
        from nybble.run.folder import open_run

        return open_run(resume).recipe
    more = [f"train.processes={processes}"] if processes is not None else []
    return _recipe(words, config, ("model.path", "data.path"), own, more)


def data_recipe(words: list[str], config: pathlib.Path | None, own: Sequence[str] = ()) -> Recipe:
    """What to look at: DATA, MODEL and KEY=VALUE over a file."""
    recipe = _recipe(words, config, ("data.path", "model.path"), own)
    if not recipe.data.path:
        raise RecipeError(
            "DATA is missing", fix="nybble data check DATA, a file, folder, pattern or Hub id; or -c recipe.yaml"
        )
    return recipe


def own_options(context: typer.Context) -> list[str]:
    """A command's own options, such as --config."""
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def complete_words(incomplete: str) -> list[str]:
    """What a word may become: an option of the recipe with its equals sign, one of its values, a file or folder."""
    from nybble.recipe import option_names
    from nybble.recipe.values import choices, example, kinds_of

    key, equals, begun = incomplete.partition("=")
    if equals:
        kinds = kinds_of(key) or ()
        words = [*choices(kinds), *(["true", "false"] if bool in kinds else [])]
        return [f"{key}={word}" for word in words if word.startswith(begun)] or [
            f"{key}={name}" for name in _paths(begun)
        ]
    names = [name for name in option_names() if incomplete and name.startswith(incomplete)]
    # A shell puts a space behind the only word there is, and a value must follow without one.
    shown = [example(name) for name in names] if len(names) == 1 else []
    return [*(f"{name}=" for name in names), *shown, *_paths(incomplete)]


def _paths(begun: str) -> list[str]:
    folder = os.path.dirname(begun)
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    shown = [entry for entry in entries if not entry.name.startswith(".") or os.path.basename(begun).startswith(".")]
    names = [os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "") for entry in shown]
    return [name for name in names if name.startswith(begun)]


def refuse_missing(recipe: Recipe) -> None:
    """Files and folders that can only be paths must be there: said before anything is loaded.

    Raises:
        ModelError, DataError: what is missing.
    """
    model, data = recipe.model.path, recipe.data
    if model and not os.path.exists(model) and (_can_be_only_a_path(model) or "/" not in model):
        raise _missing(ModelError, f"there is no folder {model}, and it is not a Hub id (owner/name)", model)
    if recipe.adapter is not None and not os.path.exists(recipe.adapter):
        raise _missing(ModelError, f"there is no adapter in {recipe.adapter}: no such folder", recipe.adapter)
    rows = [*data.names, *([data.validation] if isinstance(data.validation, str) else [])]
    for name in rows:
        path = os.path.expanduser(name)
        is_file = _can_be_only_a_path(name) or pathlib.Path(name.removesuffix(".gz")).suffix.lower() in SUFFIXES
        if is_file and not set(name) & set("*?[") and not os.path.lexists(path):
            raise _missing(DataError, f"there is no file {path}", path)
    if data.template.endswith(".jinja") and not os.path.exists(os.path.expanduser(data.template)):
        raise _missing(DataError, f"there is no template {data.template}", data.template)


SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


def _can_be_only_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _missing(kind: type[NybbleError], what: str, path: str) -> NybbleError:
    return kind(what, fix=f"ls {os.path.dirname(path) or '.'}")


def _recipe(
    words: list[str], config: pathlib.Path | None, places: tuple[str, str], own: Sequence[str], more: Sequence[str] = ()
) -> Recipe:
    from nybble.cli.flags import sort_words
    from nybble.recipe import load_recipe

    texts, options = sort_words(words, places, own)
    return load_recipe(config, [*options, *more], texts=texts)
