"""Paths in a recipe, made independent of the current folder."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Mapping
from typing import Any

from nybble.recipe.options import Recipe

PATTERN = frozenset("*?[")
PLACES = ("model.path", "adapter", "data.path", "data.template", "data.validation", "train.eval_data", "out")


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with every local path in it absolute; what does not exist, such as a Hub id, stays as it is."""
    tree = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    sections: dict[str, dict[str, Any]] = {}
    for option in PLACES:
        *section, name = option.split(".")
        holder = tree[section[0]] if section else recipe
        sections.setdefault("".join(section), {})[name] = _absolute(option, getattr(holder, name))
    own = sections.pop("")
    copies = {name: tree[name].model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update={**own, **copies})


def absolute_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a recipe as nested mappings, such as start.json keeps."""
    changed = copy.deepcopy(dict(tree))
    for option in PLACES:
        *section, name = option.split(".")
        holder = changed.get(section[0], {}) if section else changed
        if name in holder:
            holder[name] = _absolute(option, holder[name])
    return changed


def here(name: str) -> str:
    """A path from the root. Links stay as they are named, and `..` is removed where that leads to the same file."""
    path = os.path.expanduser(name)
    short = os.path.abspath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else os.path.join(os.getcwd(), path)


def _is_template_name(template: str) -> bool:
    """Whether it names a template of nybble's or of the model's, and not a file: that has a suffix or a folder before it."""
    return os.sep not in template and not os.path.splitext(template)[1]


def _absolute(option: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(option, name) for name in value]
    if isinstance(value, dict):
        return {_absolute(option, name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not value or (option == "data.template" and _is_template_name(value)):
        return value
    if option == "out" or os.path.exists(os.path.expanduser(value)):
        return here(value)
    if option.startswith("data.") and option != "data.template" and PATTERN & set(value):
        path = os.path.expanduser(value)  # the folders above it are no pattern, whatever they are called
        return path if os.path.isabs(path) else os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))
    return value
