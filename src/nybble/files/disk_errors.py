"""Errors of full disks and closed paths as one message."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from nybble.errors import NybbleError, PlaceError
from nybble.files.paths import FULL, nearest
from nybble.terminal import bytes_text

CLOSED = {  # errors of a path, and what helps
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EBUSY),
        "nybble doctor checks the folders that nybble writes to",
    ),
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "remove the link: it leads back to itself",
    errno.EIO: "check the disk: it failed to read or write",
    errno.ESTALE: "remount the network file system",
}
FULL_TEXTS = (
    "os error 28",  # tokenizers, as a plain Exception; safetensors
    "os error 122",  # the same for a quota
    "Not enough free space",  # numpy, in an OSError without a number
    "requested and",  # the same, of a file that was opened before
    "disk is full",  # sqlite
    "iostream error",  # torch.save to a name
    "inline_container.cc",  # torch.save, at the end of a file that was cut off
)


def explained_disk(*paths: pathlib.Path) -> contextlib.ExitStack:
    """Turn errors of a full disk or a closed path into one message that names the path.

    No error is caught: tokenizers raises a plain Exception, and errors with another cause must pass unchanged.

    Args:
        paths: what is written to inside, since the error of a full disk does not say which it was; by default the current
            folder and that of temporary files.

    Raises:
        PlaceError: instead of the library's error.
    """
    stack = contextlib.ExitStack()
    stack.push(functools.partial(_explain, paths))
    return stack


def _explain(paths: Sequence[pathlib.Path], kind: object, error: BaseException | None, trace: object) -> None:
    if error is None or isinstance(error, NybbleError):
        return
    if _is_full(error):
        usual = (pathlib.Path(), pathlib.Path(tempfile.gettempdir()))
        path = min(map(nearest, paths or usual), key=lambda path: shutil.disk_usage(path).free)
        raise PlaceError(
            "the disk is full",
            where=f"{path}, {bytes_text(shutil.disk_usage(path).free)} free",
            fix="free some space there; then resume a run that has a checkpoint: nybble train --resume RUN",
        ) from error
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # tempfile found none to write to
        raise PlaceError(str(error.strerror), fix="set TMPDIR to a writable folder") from error
    if isinstance(error, OSError) and error.errno in CLOSED and isinstance(error.filename, str | os.PathLike):
        raise PlaceError(
            f"{os.fsdecode(error.filename)} cannot be opened: {str(error.strerror).lower()}",
            fix=CLOSED[error.errno],
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if not isinstance(error, NybbleError) and any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
