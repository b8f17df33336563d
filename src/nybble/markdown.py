"""Text that comes from rows, names and paths, in Markdown: it is read as text, whatever it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

MARKUP = re.compile(
    r"([\\`*\[\]<>|#&~$!]|(?<![^\W_])_|_(?![^\W_]))"
)  # what would be read as markup; not the _ of arc_easy


def escaped(text: str) -> str:
    """Text in one line, which may stand in a table: no HTML, no emphasis, no links."""
    return MARKUP.sub(r"\\\1", re.sub(r"\s+", " ", text))


def code(text: str) -> str:
    """A word in code type, in one line, which may stand in a table."""
    marks = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return marks + space + " ".join(text.split()).replace("|", "\\|") + space + marks


def fence(text: str, language: str = "text") -> str:
    """A block of code that nothing in the text can end."""
    marks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n{text}\n{marks}"


def front_matter(fields: Mapping[str, Any]) -> str:
    """The YAML with which a model card begins, between its two lines of dashes; no text in it breaks a line."""
    plain = {
        name: storable(" ".join(value.split())) if isinstance(value, str) else value for name, value in fields.items()
    }
    return f"---\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10**9)}---\n"


def storable(text: str) -> str:
    """Text that can be written as UTF-8: a lone surrogate stands in the name of a file that is not, and in JSON."""
    return text.encode("utf-8", "replace").decode("utf-8")
