"""Locks that the kernel holds for a process and releases when it ends, however it ends; the lock file names the holder.

A lock file that a dead process left behind is not locked: the next process takes it without a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator

from filelock import FileLock, Timeout, lock_descriptor

from nybble.errors import RunError

PATIENCE = 1.0  # seconds: a process that only checks whether a lock is held has it for a moment
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # from flock, by file system
# Follow no link and wait for no pipe; Windows has neither flag.
OPEN_FLAGS: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock; its fields are the JSON keys of the lock file."""

    pid: int
    host: str
    kernel: str
    """Processes of one kernel see each other's locks, whatever the file system and the container."""
    doing: str
    """What it does, as in "is being ...": trained, evaluated."""
    place: str
    """The path that it does that to, absolute and without links."""
    since: str
    """Local time."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.pid else "another process"


def kernel() -> str:
    """An id of this boot of this machine's kernel; on systems other than Linux, the machine's network name."""
    return BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else platform.node()


@contextlib.contextmanager
def hold(file: pathlib.Path, doing: str, path: pathlib.Path) -> Iterator[None]:
    """Hold a lock and remove its file afterwards. On a file system without locks nothing is held.

    Args:
        file: the lock file.
        doing: what is done in the meantime, as in "is being ...".
        path: what it is done to.

    Raises:
        RunError: another process holds it; the message says which.
    """
    lock = FileLock(file, timeout=PATIENCE, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise _held_error(file, holder(file) or _unknown_holder(doing, path), path) from None
    except OSError as error:
        if (held_by := holder(file)) is not None:  # another user, whose file this one may not write to
            raise _held_error(file, held_by, path) from None
        if error.errno not in (*WITHOUT_LOCKS, errno.EACCES, errno.EPERM):
            raise
    try:
        if lock.is_locked:
            _write_holder(file, _this_process(doing, path))
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder was made read-only or removed in the meantime
            file.unlink()
        lock.release()


def _write_holder(file: pathlib.Path, held_by: Holder) -> None:
    try:
        file.write_text(json.dumps(dataclasses.asdict(held_by)), encoding="utf-8")
    except PermissionError:
        if sys.platform != "win32":  # there nobody can write to a locked file, so it names no holder
            raise


def refuse_held(file: pathlib.Path, path: pathlib.Path) -> None:
    """Raise RunError if another process holds a lock."""
    held_by = holder(file)
    if held_by is not None and (held_by.pid, held_by.kernel) != (os.getpid(), kernel()):
        raise _held_error(file, held_by, path)


def holder(file: pathlib.Path) -> Holder | None:
    """The process that holds a lock now; None if nobody does, there is no lock, or the file system has no locks."""
    with _opened(file) as descriptor:
        if descriptor is None or _lock(descriptor) is not False:
            return None
        return _read(descriptor) or _unknown_holder("used", file)


@contextlib.contextmanager
def holder_is_dead(file: pathlib.Path) -> Iterator[bool]:
    """Whether a lock's holder is certainly dead; while the block runs, no other process finds the same.

    It is dead if it ran on this kernel, wrote that to the file while it held the lock, and no longer holds it. For a process of
    another machine this cannot be known: some file systems do not show its locks here.
    """
    with _opened(file) as descriptor:
        last_holder = _read(descriptor) if descriptor is not None else None
        if descriptor is None or last_holder is None or last_holder.kernel != kernel():
            yield False
        else:  # if the file has no name any more, its holder has just removed it and is still running
            yield _lock(descriptor) is True and os.fstat(descriptor).st_nlink > 0


def names_nobody(file: pathlib.Path) -> bool:
    """Whether no holder stands in a lock file: a process was killed between making it and writing who it is, or it is damaged."""
    with _opened(file) as descriptor:
        return descriptor is not None and _read(descriptor) is None


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[int | None]:
    """A descriptor of a file that exists: locks on NFS need one that can write, but another user's file can only be read."""
    descriptor = None
    for mode in (os.O_RDWR, os.O_RDONLY):
        with contextlib.suppress(OSError):
            descriptor = os.open(file, mode | OPEN_FLAGS)
            break
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock a descriptor until it is closed. Whether the lock was free; None on a file system without locks."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:
        return None


def _read(descriptor: int) -> Holder | None:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return Holder(**json.loads(os.read(descriptor, 65536)))
    except (OSError, ValueError, TypeError, RecursionError):  # not written yet, damaged, or a pipe
        return None


def _this_process(doing: str, path: pathlib.Path) -> Holder:
    now = datetime.datetime.now().isoformat(" ", "seconds")
    return Holder(os.getpid(), platform.node(), kernel(), doing, os.path.realpath(path), now)


def _unknown_holder(doing: str, path: pathlib.Path) -> Holder:
    return Holder(0, "", "", doing, str(path), "")


def _held_error(file: pathlib.Path, held_by: Holder, path: pathlib.Path) -> RunError:
    stop = f", or stop it: kill -INT {held_by.pid}" if held_by.pid else ""
    on_host = f" on {held_by.host}" if held_by.pid and held_by.host != platform.node() else ""
    what = f"{path} is being {held_by.doing} by {held_by}"
    return RunError(what, where=str(file), fix=f"wait until it ends{stop}{on_host}")
