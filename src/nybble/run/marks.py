"""COMPLETE marks a folder of the run as complete: it is written last, with sizes and digests of the folder's other files.

In a checkpoint it also has the time and memory that the run had used until then.
"""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Collection
from typing import Any

from nybble.errors import RunError
from nybble.files.digests import describe, faults
from nybble.files.reading import RESTORE, read_shape
from nybble.run.records import AnyText, FileEntry, FrozenShape

COMPLETE = "COMPLETE"


class Mark(FrozenShape):
    """The content of COMPLETE."""

    seconds: float = 0.0
    """The run's time until the checkpoint."""
    peak_memory: int = 0
    """The run's peak memory until the checkpoint, in bytes."""
    files: dict[AnyText, FileEntry] | None = None
    """None before 0.7."""


def read_mark(folder: pathlib.Path) -> dict[str, Any]:
    """The content of COMPLETE in a checkpoint or an adapter; 0.5.1 left it empty, and 0.6.0 listed no files.

    Raises:
        RunError: it is damaged.
    """
    file = folder / COMPLETE
    empty = file.is_file() and not file.stat().st_size
    return {} if empty else read_shape(file, Mark, RunError, RESTORE).as_json()


def described(folder: pathlib.Path, ignored: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Sizes and digests of a folder's files, except COMPLETE and the ignored ones."""
    return {name: entry for name, entry in describe(folder).items() if name not in {COMPLETE, *ignored}}


def check_adapter(folder: pathlib.Path) -> None:
    """Compare an adapter with its COMPLETE; older versions wrote none.

    Raises:
        RunError: naming the file, and how to get the adapter back.
    """
    if not (folder / COMPLETE).exists():
        return
    files = read_mark(folder).get("files") or {}
    is_in_run = (
        folder.parent / "recipe.yaml"
    ).is_file()  # a checkpoint's COMPLETE may be an older version's, without files
    wrong = faults(folder, files) if files or not is_in_run else [f"{COMPLETE} lists no files"]
    if wrong:
        name, again = shlex.quote(str(folder)), ""
        if any((folder.parent / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")):
            run = shlex.quote(str(folder.parent))
            again = (
                f", or make it again from the run's checkpoints: mv {name} {name}-damaged; nybble train --resume {run}"
            )
        raise RunError(
            f"the adapter is damaged: {wrong[0]}",
            where=str(folder),
            fix=f"{RESTORE}{again}; if you changed it yourself: rm {shlex.quote(str(folder / COMPLETE))}",
        )
