"""Reads a value as a user types it, by the type of its option: a text option takes the text unchanged.

YAML alone would read the revision 123456 as a number, 2024-01-01 as a date and `on` as a boolean.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from yaml.constructor import ConstructorError

from nybble.recipe.options import Options, Recipe

NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
PERCENT = re.compile(r"(\d+\.?\d*|\.\d+) ?%")
EXAMPLES = {
    # for options whose default and type give none
    "model.path": "meta-llama/Llama-2-7b-hf",
    "model.revision": "main",
    "model.rope_scaling": "{rope_type: linear, factor: 2.0}",
    "adapter": "runs/NAME/adapter",
    "lora.targets": "q_proj,v_proj",
    "engine.fp8_skip": "down_proj",
    "data.path": "rows.jsonl",
    "data.map": "prompt:question,completion:answer",
    "preference.beta": "0.3",
    "train.neftune_alpha": "5",
    "train.eval_tasks": "arc_easy,piqa",
    "train.vram": "12GB",
    "export.to": "merged,gguf",
    "out": "runs/NAME",
}


class RecipeLoader(yaml.SafeLoader):
    """YAML without dates, since no option is a date."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def kinds_of(key: str) -> tuple[Any, ...] | None:
    """The types that an option accepts, by its dotted name; None if there is no such option."""
    section: type[Options] = Recipe
    *path, leaf = key.split(".")
    for name in path:
        field = section.model_fields.get(name)
        if field is not None and name == path[-1] and get_origin(field.annotation) is dict:
            return _kinds(get_args(field.annotation)[1])  # data.map.prompt=question
        if field is None or not _is_section(field.annotation):
            return None
        section = field.annotation  # type: ignore[assignment]
    field = section.model_fields.get(leaf)
    if field is None or _is_section(field.annotation):
        return None
    return _kinds(field.annotation)


def read_argument(text: str, kinds: tuple[Any, ...] | None) -> Any:
    """The value of `key=value`.

    Args:
        text: what follows the equals sign.
        kinds: the types of the option; None if there is no such option, or if it is a section.

    Raises:
        yaml.YAMLError: brackets or quotes are not closed, or the value does not fit its tag.
    """
    if kinds is None:
        return read_node(yaml.compose(text, RecipeLoader), None)
    if text[:1] in ("'", '"') and len(text) > 1 and text[-1] == text[0]:
        return read_node(yaml.compose(text, RecipeLoader), kinds)
    is_nested = text[:1] in ("[", "{") and any(get_origin(kind) in (list, dict) for kind in kinds)
    if is_nested and not (str in kinds and os.path.exists(text)):
        return read_node(yaml.compose(text, RecipeLoader), kinds)
    return _read_text(text, kinds)


def read_node(node: yaml.Node | None, kinds: tuple[Any, ...] | None) -> Any:
    """A value in a YAML file, read as `read_argument` reads one."""
    if node is None:
        return None
    if kinds is None or Any in kinds:
        return _constructed(node)
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:  # in quotes
            return node.value
        return _read_text(node.value, kinds) if node.value else None
    if isinstance(node, yaml.SequenceNode):
        element = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        return [read_node(child, _kinds(element)) if element else _constructed(child) for child in node.value]
    value = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), None)
    if value is None or value is Any:
        return _constructed(node)
    assert isinstance(node, yaml.MappingNode), "scalars and sequences are read above"
    _flatten(node)
    pairs = [_pair(key, child) for key, child in node.value]
    return {name: read_node(child, _kinds(value)) for name, child in pairs}


def read_section(node: yaml.Node, section: type[Options] = Recipe) -> Any:
    """A mapping of options, or whatever else the node is."""
    if not isinstance(node, yaml.MappingNode):
        return _constructed(node)
    _flatten(node)
    values = {}
    for key, child in node.value:
        name = _name(key)
        field = section.model_fields.get(name)
        if field is not None and _is_section(field.annotation):
            values[name] = read_section(child, field.annotation)  # type: ignore[arg-type]
        else:
            values[name] = read_node(child, _kinds(field.annotation) if field is not None else None)
    return values


def example(key: str, *, similar_to: str = "", in_file: bool = False) -> str:
    """An example that sets an option, in the syntax of the command line or of a recipe.

    Args:
        key: its dotted name.
        similar_to: the value that was given: if the option has a fixed set of values, the one most like it is shown.
        in_file: in the syntax of a recipe.
    """
    kinds = kinds_of(key)
    assert kinds is not None, key
    allowed = choices(kinds)
    if key in EXAMPLES:
        value = EXAMPLES[key]
    elif allowed:
        prefix = similar_to[:3].lower()
        value = next((choice for choice in allowed if prefix and choice.startswith(prefix)), allowed[0])
    elif bool in kinds:
        value = "true"
    else:
        default = _default(key)
        value = (
            f"{default:g}" if isinstance(default, int | float) else str(default or ("100" if int in kinds else "NAME"))
        )
    if in_file:
        return f"{key.rsplit('.', 1)[-1]}: {_as_yaml(value, kinds)}"
    return shlex.quote(f"{key}={value}") if not re.fullmatch(r"[\w.,:/=-]+", value) else f"{key}={value}"


def choices(kinds: Iterable[Any]) -> list[str]:
    """The values that an option can be chosen from."""
    return [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]


def _as_yaml(value: str, kinds: tuple[Any, ...]) -> str:
    if str not in kinds and any(get_origin(kind) is list for kind in kinds):
        return f"[{value.replace(',', ', ')}]"
    if dict[str, str] in kinds:
        return "{" + value.replace(":", ": ").replace(",", ", ") + "}"
    return value


def _default(key: str) -> Any:
    value: Any = Recipe()
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _read_text(text: str, kinds: tuple[Any, ...]) -> Any:
    """The meaning of unquoted text for an option of these types; text that fits none is left for validation to refuse."""
    is_text = str in kinds
    if type(None) in kinds and text.lower() in (("null", "~") if is_text else ("null", "~", "none")):
        return None
    if (float in kinds or int in kinds) and (number := _number(text, percent=float in kinds)) is not None:
        return number
    if is_text or bool in kinds or text in choices(kinds):
        return text
    number = _number(text)
    if number is not None:  # a lone number is not a list or mapping: validation refuses it
        return number
    if any(get_origin(kind) is list for kind in kinds):
        return [part.strip() for part in text.split(",") if part.strip()]
    if dict[str, str] in kinds:
        parts = [re.split("[:=]", part, maxsplit=1) for part in text.split(",")]
        return {part[0].strip(): part[1].strip() for part in parts} if all(len(part) == 2 for part in parts) else text
    return text


def _number(text: str, *, percent: bool = False) -> int | float | None:
    if percent and (share := PERCENT.fullmatch(text)):
        return float(share[1]) / 100
    if not NUMBER.fullmatch(text) or len(text) > sys.get_int_max_str_digits():  # Python refuses to parse more digits
        return None
    return int(text) if re.fullmatch(r"[+-]?\d[\d_]*", text) and not text.endswith("_") else float(text)


def _pair(key: yaml.Node, child: yaml.Node) -> tuple[str, yaml.Node]:
    """A key and its value; YAML reads `{prompt:question}`, without a space, as a key without a value."""
    name = _name(key)
    left, colon, right = name.partition(":")
    if colon and right and isinstance(child, yaml.ScalarNode) and child.value == "" and child.style is None:
        return left, yaml.ScalarNode("tag:yaml.org,2002:str", right)
    return name, child


def _name(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise ConstructorError(None, None, "a key must be text, not a list or a mapping", key.start_mark)
    return str(key.value)


def _constructed(node: yaml.Node) -> Any:
    loader = RecipeLoader("")
    try:
        return loader.construct_document(node)
    except (ValueError, LookupError, AttributeError) as error:  # from PyYAML: `!!int x`, `!!bool x`, `!!timestamp x`
        raise ConstructorError(None, None, "a value that cannot be read", node.start_mark) from error
    finally:
        loader.dispose()


def _flatten(node: yaml.MappingNode) -> None:
    """Replace merge keys (`<<: *other`) by the keys they stand for."""
    loader = RecipeLoader("")
    try:
        loader.flatten_mapping(node)
    finally:
        loader.dispose()
