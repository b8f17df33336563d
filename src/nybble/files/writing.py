"""Atomic writes of text and JSON, and appends to files of one JSON object per line."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from nybble.files.atomic import replacing


def write_text(file: pathlib.Path, text: str) -> None:
    """Write a file atomically: after a crash it is either complete or as it was before."""
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(file, _as_json(value, 2) + "\n")


def append_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Add one line; one that a crash cut off is dropped when the run is resumed."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_as_json(value) + "\n")


def _as_json(value: Any, indent: int | None = None) -> str:
    """JSON without escapes, for people to read; only a file name that is not UTF-8 needs them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    is_utf8 = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
    return text if is_utf8 else json.dumps(value, indent=indent)
