"""Locks that the kernel holds for a process, so they end with it however it ends; a file says who holds one.

A file that a dead process left behind is locked by nobody: the next one takes it without a word.
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

PATIENCE = 1.0  # seconds: a process that only looks whether a lock is held has it for a moment
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # from flock, by file system
# No link is followed and no pipe waited for; Windows has neither flag.
OPEN_FLAGS: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    kernel: str
    """Processes of one kernel see each other's locks, whatever the file system and the container."""
    doing: str
    """What it does, as in "is being ...": trained, evaluated."""
    place: str
    """What it does that to: an absolute path without links."""
    since: str
    """Local time."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.pid else "another process"


def kernel() -> str:
    """This boot of this machine's kernel; another system than Linux is known by its name on the network."""
    return BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else platform.node()


@contextlib.contextmanager
def hold(file: pathlib.Path, doing: str, place: pathlib.Path) -> Iterator[None]:
    """Hold a lock; its file is gone afterwards. On a file system that has no locks nothing is held.

    Args:
        file: the lock's.
        doing: what is done meanwhile, as in "is being ...".
        place: what it is done to.

    Raises:
        RunError: another process holds it; the message says which.
    """
    lock = FileLock(file, timeout=PATIENCE, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise _busy(file, holder(file) or _unknown(doing, place), place) from None
    except OSError as error:
        if (held := holder(file)) is not None:  # by another user, whose file this one may not write to
            raise _busy(file, held, place) from None
        if error.errno not in (*WITHOUT_LOCKS, errno.EACCES, errno.EPERM):
            raise
    try:
        if lock.is_locked:
            _say_who(file, _this_process(doing, place))
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that was made read-only or removed meanwhile
            file.unlink()
        lock.release()


def _say_who(file: pathlib.Path, held: Holder) -> None:
    try:
        file.write_text(json.dumps(dataclasses.asdict(held)), encoding="utf-8")
    except PermissionError:
        if sys.platform != "win32":  # where a locked file can be written by nobody: it then says no name
            raise


def refuse_held(file: pathlib.Path, place: pathlib.Path) -> None:
    """Raise RunError where another process holds a lock."""
    held = holder(file)
    if held is not None and (held.pid, held.kernel) != (os.getpid(), kernel()):
        raise _busy(file, held, place)


def holder(file: pathlib.Path) -> Holder | None:
    """Who holds a lock now; None where nobody does, there is none, or the file system has no locks."""
    with _opened(file) as stream:
        if stream is None or _lock(stream) is not False:
            return None
        return _read(stream) or _unknown("used", file)


@contextlib.contextmanager
def of_the_dead(file: pathlib.Path) -> Iterator[bool]:
    """Whether a lock's holder is surely dead; while the block runs, nobody else finds the same.

    It is where the holder ran on this kernel, said so in the file while it held the lock, and holds it no more. Of another
    machine's process this cannot be told: some file systems do not show its locks here.
    """
    with _opened(file) as stream:
        held = _read(stream) if stream is not None else None
        if stream is None or held is None or held.kernel != kernel():
            yield False
        else:  # a file without a name was removed by its holder just now, which is at work yet
            yield _lock(stream) is True and os.fstat(stream).st_nlink > 0


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[int | None]:
    """A descriptor of a file that exists: locks on NFS want one that can write, another user's file can only be read."""
    number = None
    for mode in (os.O_RDWR, os.O_RDONLY):
        with contextlib.suppress(OSError):
            number = os.open(file, mode | OPEN_FLAGS)
            break
    try:
        yield number
    finally:
        if number is not None:
            os.close(number)


def _lock(descriptor: int) -> bool | None:
    """Take a descriptor's lock until that is closed: whether it was free; None on a file system that has no locks."""
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


def _this_process(doing: str, place: pathlib.Path) -> Holder:
    now = datetime.datetime.now().isoformat(" ", "seconds")
    return Holder(os.getpid(), platform.node(), kernel(), doing, os.path.realpath(place), now)


def _unknown(doing: str, place: pathlib.Path) -> Holder:
    return Holder(0, "", "", doing, str(place), "")


def _busy(file: pathlib.Path, held: Holder, place: pathlib.Path) -> RunError:
    stop = f", or stop it: kill -INT {held.pid}" if held.pid else ""
    there = f" on {held.host}" if held.pid and held.host != platform.node() else ""
    return RunError(f"{place} is being {held.doing} by {held}", where=str(file), fix=f"wait until it ends{stop}{there}")
