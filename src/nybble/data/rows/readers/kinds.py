"""What a file's name says of it."""

from __future__ import annotations

import pathlib


def is_packed(path: pathlib.Path) -> bool:
    """Whether a file is gzip's, by its name."""
    return path.suffix.lower() == ".gz"


def kind_of(path: pathlib.Path) -> str:
    """The suffix that says what a file holds, in small letters."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""
