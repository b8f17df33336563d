"""Where nybble reads and writes: the cache, which folders are writable, how much disk is free."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import tempfile

from nybble.errors import RunError, StorageError
from nybble.terminal import bytes_text

ANOTHER_CACHE = "nybble --cache FOLDER COMMAND ..., or set XDG_CACHE_HOME to a writable folder"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = 4096  # bytes: an empty file can be made even on a full disk


def default_cache() -> pathlib.Path:
    """Where quantised bases, tokenised data, digests, scores and the embedded model are kept: $XDG_CACHE_HOME/nybble, or
    ~/.cache/nybble.

    Raises:
        StorageError: neither is set, and this user has no home folder.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the standard says to ignore relative paths
        return pathlib.Path(xdg) / "nybble"
    try:
        return pathlib.Path.home() / ".cache" / "nybble"
    except RuntimeError as error:
        raise StorageError(
            "there is no home folder to keep the cache in: HOME is not set", fix=ANOTHER_CACHE
        ) from error


def provide_home(cache: pathlib.Path | None) -> None:
    """Let libraries use the cache as the home folder where this user has none: nltk fails to load without one."""
    if os.path.expanduser("~") == "~":
        with contextlib.suppress(StorageError):  # a command that needs a cache reports it
            os.environ["HOME"] = str(cache or default_cache())


def nearest_existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the nearest one above it that exists and may be looked at."""
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if os.path.exists(parent))


def check_current_folder() -> None:
    """Refuse to start in a folder that is gone, where relative paths mean nothing.

    Raises:
        StorageError: it is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise StorageError(
            "the current folder was removed or moved", fix='cd "$PWD", or cd to another folder'
        ) from error


def check_cache(cache: pathlib.Path) -> None:
    """Refuse a cache that cannot be written to, or that contains folders of another user.

    Raises:
        StorageError: with the reason.
    """
    check_writable(cache, "the cache", ANOTHER_CACHE)
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if folder.is_dir():
            check_writable(folder, "the cache", ANOTHER_CACHE)


def check_writable(folder: pathlib.Path, what: str, fix: str) -> None:
    """Refuse a folder that cannot be written to: it tries a small file. The folder need not exist yet.

    Args:
        folder: the folder.
        what: what would be written there, as the subject of the message.
        fix: how to choose another folder.

    Raises:
        StorageError: with the reason.
    """
    path = nearest_existing(folder)
    try:
        _check_names_and_links(folder)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(PROBE))
            probe.flush()
    except OSError as error:
        raise StorageError(f"{what} cannot be written: {_reason(error, path)}", where=str(folder), fix=fix) from error


def _check_names_and_links(folder: pathlib.Path) -> None:
    """Raise OSError for a name that is too long, and for a dangling link in the path, such as one to a disk that is gone."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise OSError(errno.ENOENT, f"{path} is a link to {os.readlink(path)}, which does not exist")
    longest = max(len(os.fsencode(part)) for part in (*folder.parts, "."))
    if sys.platform == "win32":
        most = 255
    else:
        most = os.pathconf(nearest_existing(folder), "PC_NAME_MAX")
    if longest > most:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _reason(error: OSError, path: pathlib.Path) -> str:
    if error.errno == errno.ENOENT:
        return str(error.strerror)
    if error.errno == errno.ENAMETOOLONG:
        return "its name is too long"
    if error.errno == errno.ENOTDIR or not os.path.isdir(path):
        return f"{path} is a file, not a folder"
    if error.errno == errno.EROFS:
        return f"{path} is read-only"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not write to {path}"
    if error.errno in DISK_FULL:
        return f"the disk that holds {path} is full"
    return f"{path}: {error.strerror}"


def check_free_space(folder: pathlib.Path, size: int, what: str, fix: str) -> None:
    """Refuse if the disk of a folder does not have this many bytes free. The folder need not exist.

    Raises:
        RunError: with the bytes needed and free.
    """
    path = nearest_existing(folder)
    free = shutil.disk_usage(path).free
    if free < size:
        raise RunError(
            f"{what} needs about {bytes_text(size)}, but only {bytes_text(free)} are free",
            where=str(path),
            fix=fix,
        )
