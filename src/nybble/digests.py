"""What files held when they were written: sizes and digests, and what is wrong with the files now.

XXH3 of 128 bits (Yann Collet, xxhash.com): 8 GB/s on one core where SHA-256 makes 1.4. It tells damage, not an attacker: who may
write to a folder can write its digests too.
"""

from __future__ import annotations

import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import xxhash

Entries = Mapping[str, Mapping[str, Any]]
"""`size` in bytes and `digest` of each file, by its path inside a folder with forward slashes."""


def digest(file: pathlib.Path) -> str:
    """The digest of a file's bytes as 32 hexadecimal digits; the file is mapped and never held in memory."""
    if not file.stat().st_size:  # an empty file cannot be mapped
        return xxhash.xxh3_128_hexdigest(b"")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


def describe(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file in a folder and in the folders within it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "digest": digest(file)} for file in files
    }


def faults(folder: pathlib.Path, entries: Entries) -> list[str]:
    """What is wrong with a folder's files, a sentence each; files that `entries` does not name are passed over.

    A missing file and one of another size are found before anything is read.
    """
    found = {}
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            found[name] = f"there is no {name}"
        elif (size := file.stat().st_size) != entry["size"]:
            found[name] = f"{name} has {size:,} bytes, and {entry['size']:,} were written"
    if not found:
        found = {
            name: f"{name} is not what was written (its digest differs)"
            for name, entry in entries.items()
            if digest(folder / name) != entry["digest"]
        }
    return list(found.values())
