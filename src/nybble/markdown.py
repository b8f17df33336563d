"""Escaping for Markdown: text from rows, names and paths is shown as it is, whatever it contains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

MARKUP = re.compile(
    r"([\\`*\[\]<>|#&~$!]|(?<![^\W_])_|_(?![^\W_]))"
)  # what Markdown would read as markup; not the _ in arc_easy


def escaped(text: str) -> str:
    """Text in one line that is safe in a table cell: no HTML, no emphasis, no links."""
    return MARKUP.sub(r"\\\1", re.sub(r"\s+", " ", text))


def code(text: str) -> str:
    """Inline code in one line that is safe in a table cell."""
    marks = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return marks + space + " ".join(text.split()).replace("|", "\\|") + space + marks


def fence(text: str, language: str = "text") -> str:
    """A fenced code block that nothing in the text can close."""
    marks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n{text}\n{marks}"


def front_matter(fields: Mapping[str, Any]) -> str:
    """A model card's YAML header between its two lines of dashes; every value stays on one line."""
    plain = {
        name: storable(" ".join(value.split())) if isinstance(value, str) else value for name, value in fields.items()
    }
    return f"---\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10**9)}---\n"


def storable(text: str) -> str:
    """Text that can be written as UTF-8. Lone surrogates come from JSON and from file names that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
