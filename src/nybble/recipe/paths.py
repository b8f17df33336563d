"""Makes the paths in a recipe independent of the current folder."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Mapping
from typing import Any

from nybble.recipe.options import Recipe

PATTERN = frozenset("*?[")
PATH_OPTIONS = ("model.path", "adapter", "data.path", "data.template", "data.validation", "train.eval_data", "out")


def absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with every local path in it absolute; what does not exist, such as a Hub id, stays as it is."""
    tree = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    sections: dict[str, dict[str, Any]] = {}
    for option in PATH_OPTIONS:
        *section, name = option.split(".")
        holder = tree[section[0]] if section else recipe
        sections.setdefault("".join(section), {})[name] = _absolute(option, getattr(holder, name))
    top_level = sections.pop("")
    copies = {name: tree[name].model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update={**top_level, **copies})


def absolute_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As `absolute_paths`, for a recipe as nested mappings, as stored in start.json."""
    changed = copy.deepcopy(dict(tree))
    for option in PATH_OPTIONS:
        *section, name = option.split(".")
        holder = changed.get(section[0], {}) if section else changed
        if name in holder:
            holder[name] = _absolute(option, holder[name])
    return changed


def absolute_path(name: str) -> str:
    """A path from the root. Links are not resolved, and `..` is removed if the result is the same file."""
    path = os.path.expanduser(name)
    short = os.path.abspath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else os.path.join(os.getcwd(), path)


def _is_template_name(template: str) -> bool:
    """Whether this names one of nybble's or the model's templates; a file would have a suffix or a folder."""
    return os.sep not in template and not os.path.splitext(template)[1]


def _absolute(option: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(option, name) for name in value]
    if isinstance(value, dict):
        return {_absolute(option, name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not value or (option == "data.template" and _is_template_name(value)):
        return value
    if option == "out" or os.path.exists(os.path.expanduser(value)):
        return absolute_path(value)
    if option.startswith("data.") and option != "data.template" and PATTERN & set(value):
        path = os.path.expanduser(value)  # the current folder's name is not a pattern, whatever characters it has
        return path if os.path.isabs(path) else os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))
    return value
