"""Sizes and digests of files as they were written, and what is wrong with the files now.

XXH3 of 128 bits (Yann Collet, xxhash.com): 8 GB/s on one core, where SHA-256 reaches 1.4. It detects damage, not attackers:
whoever may write to a folder can write its digests too.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import xxhash

Entries = Mapping[str, Mapping[str, Any]]
"""`size` in bytes and `digest` of each file, by its path inside a folder with forward slashes."""


def digest(file: pathlib.Path) -> str:
    """The digest of a file's bytes as 32 hexadecimal digits.

    The file is read in pieces and not mapped: if the disk fails, a read raises OSError, but a mapping kills the process.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def describe(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file in a folder and in the folders within it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "digest": digest(file)} for file in files
    }


def faults(folder: pathlib.Path, entries: Entries) -> list[str]:
    """What is wrong with a folder's files, one sentence each; files that `entries` does not name are ignored.

    Missing files and files of another size are found before anything is read.
    """
    found = [fault for name, entry in entries.items() if (fault := size_fault(folder / name, name, entry["size"]))]
    return found or [
        fault for name, entry in entries.items() if (fault := _changed(folder / name, name, entry["digest"]))
    ]


def size_fault(file: pathlib.Path, name: str, size: int) -> str:
    """What is wrong with a file's size: it is missing, or has another size than was written; empty if it has that size."""
    try:
        if not file.is_file():
            return f"there is no {name}"
        now = file.stat().st_size
    except OSError as error:
        return unreadable(error, name)
    return f"{name} has {now:,} bytes, but {size:,} were written" if now != size else ""


def unreadable(error: OSError, name: str = "") -> str:
    """The error of a file that cannot be read, as a sentence; without `name`, the file is the one that the error names."""
    name = name or pathlib.Path(str(error.filename)).name
    return f"{name} cannot be read: {str(error.strerror).lower()}"


def _changed(file: pathlib.Path, name: str, written: str) -> str:
    try:
        return f"{name} is not what was written (its digest differs)" if digest(file) != written else ""
    except OSError as error:
        return unreadable(error, name)
