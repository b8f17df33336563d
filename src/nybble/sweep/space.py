"""The search space of a sweep: ranges `a..b` and lists `a,b,c` among the key=value arguments."""

from __future__ import annotations

import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_origin

from nybble.errors import RecipeError
from nybble.recipe import Recipe, load_recipe
from nybble.recipe.values import kinds_of

NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
DECADE = 10  # ratio of the ends of a range from which it is searched on a logarithmic scale
MOST = 10_000  # combinations of a space that are listed
DIGITS = 3  # significant digits of a searched value: more would not change a loss
FIXED = {
    "train.processes": "trials run one after the other in one process",
    "train.objective": "losses of different objectives cannot be compared",
    "train.seed": "it decides which rows are held out",
}
"""Options of the searched sections that are not searched, and why."""


@dataclass(frozen=True)
class Range:
    """All numbers between two."""

    low: float
    high: float
    is_log: bool
    is_integer: bool

    def __str__(self) -> str:
        scale = ", logarithmic" if self.is_log else ""
        return f"{self.low:g}..{self.high:g}{scale}"

    def text(self, value: float) -> str:
        """A value of the range as it is written into a recipe."""
        return str(round(value)) if self.is_integer else f"{value:.{DIGITS}g}"

    def named(self, value: object) -> str | None:
        """An option's value as it is written; None if it does not lie in the range."""
        return _written(value) if isinstance(value, int | float) and self.low <= value <= self.high else None

    def parsed(self, text: str) -> int | float:
        """A value from its text."""
        return int(text) if self.is_integer else float(text)


@dataclass(frozen=True)
class Choices:
    """Some values, as they are written on the command line."""

    texts: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.texts)

    def text(self, value: object) -> str:
        """A value as it is written into a recipe."""
        return str(value)

    def named(self, value: object) -> str | None:
        """An option's value as it is written among them, 2e-4 or 0.0002; None if it is not there."""
        same = (text for text in self.texts if text == _written(value) or _is_number(text, value))
        return next(same, None)

    def parsed(self, text: str) -> str:
        """A value from its text, which it is."""
        return text


Space = Mapping[str, Range | Choices]
"""What is searched, by the name of the option."""
Settings = Mapping[str, str]
"""The value of each searched option, as it is written into a recipe."""


@dataclass(frozen=True)
class SearchedRecipe:
    """A recipe in which some options are searched."""

    config: pathlib.Path | None
    texts: Mapping[str, str]
    words: tuple[str, ...]
    space: Space

    def recipe(self, settings: Settings) -> Recipe:
        """The recipe of a trial.

        Raises:
            RecipeError: these settings contradict each other.
        """
        words = [*self.words, *(f"{key}={value}" for key, value in settings.items())]
        return load_recipe(self.config, words, texts=self.texts)

    @property
    def own(self) -> Settings:
        """The recipe's values of the searched options, where they lie in the space."""
        recipe = load_recipe(self.config, self.words, texts=self.texts)
        values = {key: value_of(recipe, key) for key in self.space}
        named = {key: self.space[key].named(value) for key, value in values.items()}
        return {key: text for key, text in named.items() if text is not None}

    @property
    def first(self) -> Settings:
        """The lower end of each range, and the first value of each list."""
        return {
            key: each.texts[0] if isinstance(each, Choices) else each.text(each.low) for key, each in self.space.items()
        }


def combinations(space: Space) -> list[dict[str, str]]:
    """All settings of a finite space; empty if it has a range of real numbers, or more than MOST of them."""
    values: list[list[str]] = []
    for each in space.values():
        if isinstance(each, Choices):
            values.append(list(each.texts))
        elif each.is_integer and each.high - each.low < MOST:
            values.append([str(number) for number in range(int(each.low), int(each.high) + 1)])
        else:
            return []
    if math.prod(map(len, values)) > MOST:
        return []
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]


def value_of(recipe: Recipe, key: str) -> object:
    """The value of an option, by its dotted name."""
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _written(value: object) -> str:
    """An option's value as it is written on the command line; lists and mappings in brackets."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _is_number(text: str, value: object) -> bool:
    """Whether a text is a number that an option has."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and bool(re.fullmatch(NUMBER, text))
        and float(text.replace("_", "")) == value
    )  # fmt: skip


def read_space(
    words: Sequence[str], config: pathlib.Path | None = None, texts: Mapping[str, str] | None = None
) -> SearchedRecipe:
    """Divide key=value arguments into those that are searched and those that hold for every trial, and check each value.

    Args:
        words: `section.key=value`.
        config: a recipe, whose options the words override.
        texts: options whose value is the text itself.

    Raises:
        RecipeError: a value, an end of a range or an option is wrong, by the recipe's own messages; or an option cannot be
            searched.
    """
    space: dict[str, Range | Choices] = {}
    plain: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        dimension = _dimension(key, text)
        if dimension is None:
            plain.append(word)
            continue
        if key in space:
            raise RecipeError(f"{key} is searched twice: {space[key]} and {text}", fix="keep one of them")
        space[key] = dimension
    searched = SearchedRecipe(config, texts or {}, tuple(plain), space)
    _check(searched)
    return searched


def _dimension(key: str, text: str) -> Range | Choices | None:
    """The range or list that a value is; None for a plain value."""
    kinds = kinds_of(key)
    if kinds is None:
        return None  # no option: the recipe says so
    is_number = float in kinds or int in kinds
    if is_number and (match := RANGE.fullmatch(text.strip())):
        low, high = (float(end.replace("_", "")) for end in match.groups())
        return _range(key, low, high, float not in kinds)
    parts = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text)]
    takes_several = any(get_origin(kind) in (list, dict) for kind in kinds)
    if len(parts) < 2 or (takes_several and not any(part.startswith(("[", "{")) for part in parts)):
        return None  # q_proj,v_proj is one value of lora.targets; [q_proj,v_proj],all-linear are two
    if len(set(parts)) < len(parts):
        raise RecipeError(f"{key}={text} names a value twice", fix=f"{key}={','.join(dict.fromkeys(parts))}")
    return Choices(tuple(parts))


def _range(key: str, low: float, high: float, is_integer: bool) -> Range:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        example = f"{key}={high:g}..{low:g}" if high < low else f"{key}={low:g}"
        raise RecipeError(f"{key}={low:g}..{high:g} is an empty range: the lower end comes first", fix=example)
    is_log = low > 0 and (high / low >= DECADE or "rate" in key.rpartition(".")[2])
    return Range(low, high, is_log, is_integer)


def _check(searched: SearchedRecipe) -> None:
    """Refuse options that cannot be searched, and values that the recipe refuses."""
    for key in searched.space:
        why = FIXED.get(key) or _unsearchable(key)
        if why:
            raise RecipeError(f"{key} cannot be searched: {why}", fix=f"{key}=ONE_VALUE; search lora.* and train.*")
    searched.recipe(searched.first)
    for key, each in searched.space.items():
        values = each.texts if isinstance(each, Choices) else (f"{each.low!r}", f"{each.high!r}")
        if isinstance(each, Range) and each.is_integer:
            values = tuple(str(int(end)) if end.is_integer() else repr(end) for end in (each.low, each.high))
        for value in values:
            searched.recipe({**searched.first, key: value})


def _unsearchable(key: str) -> str:
    section = key.partition(".")[0]
    if section == "model":
        return "a sweep loads one base once"
    if section == "data" and key != "data.packing":
        return "the held-out loss of other rows or tokens could not be compared"
    if section in ("lora", "train", "data"):
        return ""
    return "it does not change what is learnt"
