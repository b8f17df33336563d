"""Places that a recipe names, as they are found from any folder."""

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
    """The recipe with every local place in it absolute; what is not there, such as a Hub id, stays as it is."""
    tree = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    sections: dict[str, dict[str, Any]] = {}
    for place in PLACES:
        *section, name = place.split(".")
        holder = tree[section[0]] if section else recipe
        sections.setdefault("".join(section), {})[name] = _absolute(place, getattr(holder, name))
    own = sections.pop("")
    copies = {name: tree[name].model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update={**own, **copies})


def absolute_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a recipe as nested mappings, such as start.json keeps."""
    changed = copy.deepcopy(dict(tree))
    for place in PLACES:
        *section, name = place.split(".")
        holder = changed.get(section[0], {}) if section else changed
        if name in holder:
            holder[name] = _absolute(place, holder[name])
    return changed


def here(name: str) -> str:
    """A path from the root. Links stay as they are named, and `..` is taken out where that leads to the same place."""
    path = os.path.expanduser(name)
    short = os.path.abspath(path)
    return short if os.path.realpath(short) == os.path.realpath(path) else os.path.join(os.getcwd(), path)


def _is_word(template: str) -> bool:
    """Whether it is a template's name: one that comes with nybble or, which is not known yet, with the model. A file or folder
    may be called so; a file's name has an ending or a folder before it."""
    return os.sep not in template and not os.path.splitext(template)[1]


def _absolute(place: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(place, name) for name in value]
    if isinstance(value, dict):
        return {_absolute(place, name): weight for name, weight in value.items()}
    if not isinstance(value, str) or not value or (place == "data.template" and _is_word(value)):
        return value
    if place == "out" or os.path.exists(os.path.expanduser(value)):
        return here(value)
    if place.startswith("data.") and place != "data.template" and PATTERN & set(value):
        path = os.path.expanduser(value)  # the folders above it are no pattern, whatever they are called
        return path if os.path.isabs(path) else os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))
    return value
