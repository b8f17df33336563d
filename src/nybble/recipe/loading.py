"""Reads a recipe from YAML, from `key=value` arguments, or from both, and reports all its faults together."""

from __future__ import annotations

import difflib
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError

from nybble.errors import RecipeError
from nybble.files.expectations import expectation
from nybble.files.reading import brief, check_regular, read_text
from nybble.recipe.options import Recipe, option_names
from nybble.recipe.values import RecipeLoader, example, kinds_of, read_argument, read_section


def load_recipe(
    file: str | pathlib.Path | None = None, words: Sequence[str] = (), *, texts: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe from a YAML file, then let `key=value` arguments override it.

    Args:
        file: YAML with the sections of `Recipe`.
        words: `section.key=value`, read by the option's type: text unchanged, lists as `a,b` or `[a, b]`, mappings as
            `a:b,c:d` or `{a: b, c: d}`. Several arguments for one list or mapping are merged: a shell expands an unquoted `{a,b}`
            into that.
        texts: options whose value is the text itself, whatever it looks like; `words` override them.

    Raises:
        RecipeError: lists all faults; those of keys in the file come with `file:line`.
    """
    tree, lines = _read_yaml(pathlib.Path(file)) if file is not None else ({}, {})
    faults = [fault for key, text in (texts or {}).items() for fault in _set(tree, lines, key, text)]
    already_set: set[str] = set()
    faults += [fault for argument in words for fault in _override(tree, lines, argument, already_set)]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [fault for detail in error.errors() for fault in _explain(detail, lines)]
        faults = list(dict.fromkeys(faults))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(
            f"the recipe has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults),
            where=str(file) if file is not None else None,
            fix="every option with its meaning: nybble train --print-config",
        )
    return recipe


def _read_yaml(file: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's values, and the `file:line` of each dotted key."""
    if not file.exists():
        raise RecipeError(f"there is no recipe {file}", fix="ls recipes/ lists the shipped ones")
    check_regular(file, RecipeError, "name a YAML file; ls recipes/ lists the shipped ones")
    name = shlex.quote(str(file))
    text = read_text(
        file, RecipeError, f"copy it again, or, if it is Latin-1: iconv -f LATIN1 -t UTF-8 {name} > NEW.yaml"
    )
    try:
        node = yaml.compose(text, RecipeLoader)
        tree = read_section(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{file}:{line}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(
            f"a character that YAML does not allow: {error.character:#x}", where=f"{file}:{line}"
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{file.name} is nested too deeply", where=str(file)) from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of sections (model, data, lora, train)", where=f"{file}:1")
    return tree, {key: f"{file}:{line}" for key, line in _lines(node, "", set())}


def _lines(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Each key with its line; a mapping repeated by aliases is walked once, or a few lines could expand into billions."""
    if isinstance(node, yaml.MappingNode) and id(node) not in seen:
        seen.add(id(node))
        for key, value in node.value:
            name = prefix + str(key.value)
            yield name, key.start_mark.line + 1
            yield from _lines(value, name + ".", seen)


def _override(tree: dict[str, Any], lines: dict[str, str], argument: str, already_set: set[str]) -> Iterator[str]:
    """Set one `key=value` in the tree; yields what is wrong with it, and adds its key to `already_set`."""
    key, equals, text = argument.partition("=")
    kinds = kinds_of(key)
    if not equals or not key:
        yield f"{argument!r}: options are written key=value, e.g. {example(key) if kinds else 'train.epochs=2'}"
        return
    if kinds and not text.strip():
        or_null = f", or {key}=null for none" if type(None) in kinds else ""
        yield f"{key}: the value is missing; e.g. {example(key)}{or_null}"
        return
    try:
        value = read_argument(text, kinds)
    except (ConstructorError, RecursionError):  # a tag that does not fit, a number of 5,000 digits, 5,000 brackets
        yield f"{key}: {brief(text)} cannot be read" + (f"; e.g. {example(key)}" if kinds else "")
        return
    except yaml.YAMLError:
        yield f"{key}: brackets or quotes in {text!r} are not closed" + (f"; e.g. {example(key)}" if kinds else "")
        return
    if key in already_set and any(get_origin(kind) in (list, dict) for kind in kinds or ()):
        value = _merged(_get(tree, key), value)
    already_set.add(key)
    yield from _set(tree, lines, key, value)


def _set(tree: dict[str, Any], lines: dict[str, str], key: str, value: Any) -> Iterator[str]:
    branch = tree
    *sections, leaf = key.split(".")
    for name in sections:
        inner = branch.setdefault(name, {})
        if not isinstance(inner, dict):
            yield f"{key}: {name} is not a section"
            return
        branch = inner
    branch[leaf] = value
    lines.pop(key, None)


def _get(tree: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _merged(before: Any, value: Any) -> Any:
    """The values of two arguments for one list or mapping, such as a shell makes from unquoted braces."""
    if isinstance(before, dict) and isinstance(value, dict):
        return before | value
    if isinstance(before, dict) or isinstance(value, dict):
        return value
    return [*(before if isinstance(before, list) else [before]), *(value if isinstance(value, list) else [value])]


def _explain(detail: ErrorDetails, lines: Mapping[str, str]) -> Iterator[str]:
    """A pydantic error in the user's terms, with an example that would be valid."""
    parts = [str(part) for part in detail["loc"]]
    length = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) in set(option_names())), len(parts))
    key = ".".join(parts[:length])  # the parts after an option's name are pydantic's: union members and indices
    location = f" ({lines[key]})" if key in lines else ""
    if detail["type"] == "extra_forbidden":
        value = detail["input"]
        # An argument for a section that does not exist arrives as a mapping.
        unknown = (
            {f"{key}.{name}": inner for name, inner in value.items()}
            if isinstance(value, dict) and not location
            else {}
        )
        for name, inner in (unknown or {key: None if location else value}).items():
            yield f"{name}: unknown option{location}{_did_you_mean(name, inner)}"
    elif detail["type"] == "value_error" and not key:
        yield from str(detail["ctx"]["error"]).splitlines()
    else:
        given, kinds = detail["input"], kinds_of(key)
        inner = [name for name in option_names() if name.startswith(key + ".")]  # for a section that was given a value
        shown = (
            f"; e.g. {example(key if kinds else inner[0], similar_to=_as_text(given), in_file=bool(location))}"
            if kinds or inner
            else ""
        )
        what = "the value is missing" if given is None else f"{expectation(detail)}, not {brief(given)}"
        yield f"{key}: {what}{location}{shown}"


def _as_text(value: object) -> str:
    return "" if isinstance(value, list | dict) else str(value)  # aliases may have made a list or mapping endless


def _did_you_mean(key: str, value: Any) -> str:
    name = nearest_option(key)
    if name is None:
        return ""
    return f"; did you mean {name}?" if isinstance(value, dict | list | None) else f"; did you mean {name}={value}?"


def nearest_option(key: str) -> str | None:
    """The option whose name, or whose name's last part, is most similar to this one."""
    known = list(option_names())
    key = key.lower()
    leaf = key.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    matches = matches or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return matches[0] if matches else None
