"""The kind of a file, by its name."""

from __future__ import annotations

import pathlib


def is_gzipped(path: pathlib.Path) -> bool:
    """Whether a file is gzipped, by its name."""
    return path.suffix.lower() == ".gz"


def kind_of(path: pathlib.Path) -> str:
    """The suffix that tells a file's format, in lower case, without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""
