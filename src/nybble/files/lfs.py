"""git-lfs pointers: the few lines that a clone made without git-lfs has in place of each large file."""

from __future__ import annotations

import pathlib
import re
import shlex

from nybble.terminal import bytes_text

LONGEST = 1024  # bytes of a pointer, according to git-lfs's specification
POINTER = re.compile(
    rb"version https://(?:git-lfs|hawser)\.github\.com/spec/.*^size (\d+)\r?$", re.DOTALL | re.MULTILINE
)


def pointer_fault(file: pathlib.Path) -> tuple[str, str] | None:
    """What is wrong with a file that is only a pointer, and the command that fixes it; None for any other file.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        return pointer_in(stream.read(LONGEST), file)


def pointer_in(head: bytes, file: pathlib.Path) -> tuple[str, str] | None:
    """Like `pointer_fault`, for a file whose first `LONGEST` bytes have already been read."""
    pointer = POINTER.match(head)
    if pointer is None:
        return None
    what = (
        f"{file.name} is a git-lfs pointer: the file itself ({bytes_text(int(pointer[1]), 1, None)}) was not downloaded"
    )
    return what, f"git -C {shlex.quote(str(file.parent))} lfs pull (after: git lfs install)"
