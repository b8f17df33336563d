"""Comparison of files in the Hub's cache with the Hub's digests."""

from __future__ import annotations

import pathlib
import re
import shlex

from nybble.errors import ModelError


def check_download(file: pathlib.Path, digest: str) -> None:
    """Compare a file's digest with its name in the Hub's cache, which is the SHA-256 that the Hub gave for it.

    Raises:
        ModelError: the file is damaged.
    """
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) and real.name != digest:
        raise ModelError(
            f"{file.name} is damaged: its SHA-256 is {digest[:16]}..., and the Hub's is {real.name[:16]}...",
            where=str(real),
            fix=f"rm {shlex.join((str(file), str(real)))}, and run the command again: it downloads the file",
        )
