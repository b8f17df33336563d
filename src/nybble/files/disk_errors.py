"""Errors of full disks and inaccessible paths, turned into one message."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from nybble.errors import NybbleError, StorageError
from nybble.files.paths import DISK_FULL, nearest_existing
from nybble.terminal import bytes_text

PATH_FIXES = {  # errors of a path, each with its fix
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EBUSY),
        "nybble doctor checks the folders that nybble writes to",
    ),
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "remove the link: it leads back to itself",
    errno.EIO: "check the disk: it failed to read or write",
    errno.ESTALE: "remount the network file system",
}
DISK_FULL_TEXTS = (
    "os error 28",  # tokenizers, as a plain Exception; safetensors
    "os error 122",  # the same for a quota
    "Not enough free space",  # numpy, in an OSError without a number
    "requested and",  # numpy too, for a file that is already open
    "disk is full",  # sqlite
    "iostream error",  # torch.save to a path
    "inline_container.cc",  # torch.save, at the end of a file that was cut off
)


def explained_disk_errors(*paths: pathlib.Path) -> contextlib.ExitStack:
    """Turn errors of a full disk or an inaccessible path into one message that names the path.

    It catches nothing by type: tokenizers raises a plain Exception, and errors with another cause must pass unchanged.

    Args:
        paths: what is written to inside the block, since the error of a full disk does not name it; by default the current
            folder and the folder of temporary files.

    Raises:
        StorageError: instead of the library's error.
    """
    stack = contextlib.ExitStack()
    stack.push(functools.partial(_explain, paths))
    return stack


def _explain(paths: Sequence[pathlib.Path], kind: object, error: BaseException | None, trace: object) -> None:
    if error is None or isinstance(error, NybbleError):
        return
    if _is_full(error):
        usual = (pathlib.Path(), pathlib.Path(tempfile.gettempdir()))
        path = min(map(nearest_existing, paths or usual), key=lambda path: shutil.disk_usage(path).free)
        raise StorageError(
            "the disk is full",
            where=f"{path}, {bytes_text(shutil.disk_usage(path).free)} free",
            fix="free some space there; then resume a run that has a checkpoint: nybble train --resume RUN",
        ) from error
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # from tempfile
        raise StorageError(str(error.strerror), fix="set TMPDIR to a writable folder") from error
    if isinstance(error, OSError) and error.errno in PATH_FIXES and isinstance(error.filename, str | os.PathLike):
        raise StorageError(
            f"{os.fsdecode(error.filename)} cannot be opened: {str(error.strerror).lower()}",
            fix=PATH_FIXES[error.errno],
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if not isinstance(error, NybbleError) and any(text in str(error) for text in DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
