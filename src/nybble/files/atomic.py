"""Files and folders that are either complete or absent; what killed processes left unfinished is removed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator

from nybble.files.locks import PATIENCE, hold, holder, holder_is_dead, names_nobody, refuse_held
from nybble.files.paths import nearest_existing

LOCK = ".lock"  # in a run while it is being written
UNFINISHED = ".nybble-writing-"  # prefix of a folder being filled or removed; its lock has the same name plus .lock
UNFINISHED_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.writing(\.[^.]+)?")  # a file that is being written
ABANDONED_AFTER = 24 * 3600  # seconds without a change after which a file counts as abandoned if its writer is unknown


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path that replaces the file if all goes well; no two processes get the same path."""
    remove_unfinished_files(file.parent, ABANDONED_AFTER)
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(4)}.writing{file.suffix}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: pathlib.Path, marker: str | None = None) -> Iterator[pathlib.Path]:
    """A folder to fill; it becomes the target if all goes well, and is removed otherwise.

    Args:
        target: a path that does not exist yet.
        marker: a file that shows that a folder which another process put there in the meantime is the same.

    Raises:
        FileExistsError: something else is there by now.
    """
    with temporary_folder(target) as temporary:
        yield temporary
        put_in_place(temporary, target, marker)


@contextlib.contextmanager
def temporary_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside its target, removed afterwards; first it removes what killed processes left unfinished there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished_folders(target.parent)
    temporary = target.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
    with hold(_lock_of(temporary), "written", target):  # from before the folder exists until it is gone
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def run_lock(run: pathlib.Path, doing: str) -> Iterator[None]:
    """Hold the lock of a run while it is written, and remove what killed processes left unfinished in it.

    Args:
        run: the folder.
        doing: what is done to it, as in "is being ...".

    Raises:
        RunError: another process is writing it; the message says which.
    """
    with hold(run / LOCK, doing, run):
        for path in (run.parent, run):
            remove_unfinished_folders(path)
        for folder in (run, *run.glob("checkpoints/*")):
            remove_unfinished_files(folder, 0)
        yield


def refuse_busy(run: pathlib.Path) -> None:
    """Raise RunError if another process is writing a run; the message says which."""
    refuse_held(run / LOCK, run)


def remove_unfinished_folders(parent: pathlib.Path) -> None:
    """Remove the folders inside `parent` that `new_folder` did not finish because its process was killed."""
    for lock in parent.glob(f"{UNFINISHED}*{LOCK}"):
        folder = lock.with_suffix("")
        # A holder writes its name before it makes the folder: without either it was killed at once, or is about to go on.
        age = PATIENCE if names_nobody(lock) and not folder.exists() else ABANDONED_AFTER
        with holder_is_dead(lock) as is_dead:
            if is_dead or (holder(lock) is None and is_abandoned(age, lock, folder)):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # it belongs to another user
                    lock.unlink()
    for folder in parent.glob(f"{UNFINISHED}*"):
        if folder.is_dir() and not _lock_of(folder).exists() and is_abandoned(ABANDONED_AFTER, folder):
            shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished_files(folder: pathlib.Path, age: float) -> None:
    """Remove the files that `replacing` did not finish because its process was killed, once they are `age` seconds old."""
    with contextlib.suppress(OSError):  # what cannot be read or removed stays
        for file in [pathlib.Path(entry) for entry in os.scandir(folder) if UNFINISHED_FILE.fullmatch(entry.name)]:
            if is_abandoned(age, file):
                file.unlink(missing_ok=True)


def _lock_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + LOCK)


def is_abandoned(age: float, *paths: pathlib.Path) -> bool:
    """Whether some files, and everything inside some folders, are unchanged for `age` seconds."""
    changes = [0.0]
    for path in itertools.chain(paths, *map(_inside, paths)):
        try:
            changes.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue
        except OSError:  # it belongs to another user, so its age is unknown
            return False
    return max(changes) <= time.time() - age


def _inside(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything inside a folder. What another process renames or removes meanwhile is passed over, where rglob raises."""
    for parent, folders, files in os.walk(folder):
        yield from (pathlib.Path(parent, name) for name in (*folders, *files))


def put_in_place(folder: pathlib.Path, target: pathlib.Path, marker: str | None) -> None:
    """Rename a filled folder to its target. Arguments and errors are those of `new_folder`."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if marker is None or not (target / marker).exists():
            raise FileExistsError(errno.EEXIST, "another process made it in the meantime", str(target)) from error


@contextlib.contextmanager
def no_empty_folders(target: pathlib.Path) -> Iterator[None]:
    """Remove the folders that were made above a target if the target itself was not made."""
    existing = nearest_existing(target.parent)
    try:
        yield
    finally:
        for parent in target.absolute().parents:
            if target.exists() or parent == existing or not _removed(parent):
                break


def _removed(folder: pathlib.Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # not empty
        return False
    return True
