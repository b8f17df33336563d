"""A recipe as YAML, with each option's meaning above it."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from nybble.recipe.options import LoraOptions, Options, Recipe


def dump_recipe(recipe: Recipe, *, documented: bool = True) -> str:
    """The whole recipe as YAML that `load_recipe` reads back; a comment above each option gives its meaning."""
    return "\n".join(_dump(recipe, "", documented)) + "\n"


def _dump(section: Options, indent: str, documented: bool) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, LoraOptions) and isinstance(section, Recipe) and section.adapter is not None:
            continue  # when training continues from an adapter, the adapter has its own
        if isinstance(value, Options):
            if documented:
                yield f"{indent}# {type(value).__doc__}"
            yield f"{indent}{name}:"
            yield from _dump(value, indent + "  ", documented)
            continue
        if documented:
            yield f"{indent}# {field.description}"
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
        yield f"{indent}{name}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
