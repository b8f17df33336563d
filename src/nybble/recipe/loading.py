"""A recipe from YAML, from `key=value` words, or both; all its faults are raised together."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nybble.errors import RecipeError
from nybble.recipe.options import Recipe, option_names


def load_recipe(file: str | pathlib.Path | None = None, words: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, then let `key=value` words override it.

    Args:
        file: YAML with the sections of `Recipe`.
        words: `section.key=value`; the value is YAML, so `data.map={prompt: question}` is a mapping.

    Raises:
        RecipeError: with every fault at once; for a key of the file with its `file:line`.
    """
    tree, places = _read_yaml(pathlib.Path(file)) if file is not None else ({}, {})
    faults = [fault for word in words for fault in _override(tree, places, word)]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [fault for detail in error.errors() for fault in _explain(detail, places)]
        faults = list(dict.fromkeys(faults))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(
            f"the recipe has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults),
            where=str(file) if file is not None else None,
            fix="nybble train --print-config shows every option with its meaning",
        )
    return recipe


def _read_yaml(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values, and where each dotted key stands."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {file}", fix="ls recipes/ lists the shipped ones") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {file} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{file}:{line}") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of sections (model, data, lora, train)", where=f"{file}:1")
    return tree, {key: f"{file}:{line}" for key, line in _lines(node, "")}


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = prefix + str(key.value)
            yield name, key.start_mark.line + 1
            yield from _lines(value, name + ".")


def _override(tree: dict[str, Any], places: dict[str, str], word: str) -> Iterator[str]:
    """Set one `key=value` in the tree; yields what is wrong with it."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        yield f"{word!r}: options are written key=value, e.g. train.epochs=2"
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        yield f"{key}: {text!r} is not a value (YAML); put text in quotes: '{key}=\"{text}\"'"
        return
    branch = tree
    *sections, leaf = key.split(".")
    for name in sections:
        inner = branch.setdefault(name, {})
        if not isinstance(inner, dict):
            yield f"{key}: {name} is not a section"
            return
        branch = inner
    branch[leaf] = value
    places.pop(key, None)


def _explain(detail: ErrorDetails, places: Mapping[str, str]) -> Iterator[str]:
    """A pydantic error in the user's words."""
    parts = [str(part) for part in detail["loc"]]
    whole = parts[: next((n for n in range(1, len(parts)) if ".".join(parts[:n]) in set(option_names())), len(parts))]
    key = ".".join(whole)  # what follows an option's name, union members and positions, is pydantic's
    place = f" ({places[key]})" if key in places else ""
    if detail["type"] == "extra_forbidden":
        yield f"{key}: unknown option{place}{_did_you_mean(key)}"
    elif detail["type"] == "value_error" and not key:
        yield from str(detail["ctx"]["error"]).splitlines()
    else:
        yield f"{key}: {_lower(detail['msg'])}, not {detail['input']!r}{place}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _did_you_mean(key: str) -> str:
    known = list(option_names())
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else ""
