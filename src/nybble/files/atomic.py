"""Files and folders that are whole or not there, and what killed processes left of them."""

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

from nybble.files.locks import hold, holder, of_the_dead, refuse_held
from nybble.files.paths import nearest

LOCK = ".lock"  # in a run while it is written
HALF = ".nybble-writing-"  # a folder being filled or removed; beside it, with .lock at the end, its writer's lock
HALF_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.writing(\.[^.]+)?")  # a file that is being written
FORGOTTEN = 24 * 3600  # seconds without a change, after which nobody is taken to be writing where that cannot be known


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file that must end up whole or as it was; no two processes get the same name."""
    remove_half_files(file.parent, FORGOTTEN)
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(4)}.writing{file.suffix}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: pathlib.Path, proof: str | None = None) -> Iterator[pathlib.Path]:
    """A folder to fill; it becomes the target when all went well, and is removed otherwise.

    Args:
        target: which does not exist yet.
        proof: a file by which a folder that another process put there meanwhile is known for the same.

    Raises:
        FileExistsError: something else is there by now.
    """
    with folder_beside(target) as temporary:
        yield temporary
        put_in_place(temporary, target, proof)


@contextlib.contextmanager
def folder_beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder on the same disk as its target, gone afterwards; what killed processes left half-made there is removed first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_half_made(target.parent)
    temporary = target.parent / f"{HALF}{secrets.token_hex(8)}"
    with hold(_lock_of(temporary), "written", target):  # before the folder is there, and until it is not
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(run: pathlib.Path, doing: str) -> Iterator[None]:
    """Hold the lock of a run while it is written, and remove what killed processes left half-written in it.

    Args:
        run: the folder.
        doing: what is done to it, as in "is being ...".

    Raises:
        RunError: another process writes it; the message says which.
    """
    with hold(run / LOCK, doing, run):
        for path in (run.parent, run):
            remove_half_made(path)
        for folder in (run, *run.glob("checkpoints/*")):
            remove_half_files(folder, 0)
        yield


def refuse_busy(run: pathlib.Path) -> None:
    """Raise RunError where another process writes a run; the message says which."""
    refuse_held(run / LOCK, run)


def remove_half_made(parent: pathlib.Path) -> None:
    """Remove the folders beside each other that `new_folder` did not finish because its process was killed."""
    for lock in parent.glob(f"{HALF}*{LOCK}"):
        folder = lock.with_suffix("")
        with of_the_dead(lock) as is_dead:
            if is_dead or (holder(lock) is None and is_forgotten(FORGOTTEN, lock, folder)):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # another user's
                    lock.unlink()
    for folder in parent.glob(f"{HALF}*"):
        if folder.is_dir() and not _lock_of(folder).exists() and is_forgotten(FORGOTTEN, folder):
            shutil.rmtree(folder, ignore_errors=True)


def remove_half_files(folder: pathlib.Path, age: float) -> None:
    """Remove the files that `replacing` did not finish because its process was killed, and that are `age` seconds old."""
    with contextlib.suppress(OSError):  # what cannot be looked at or removed stays
        for file in [pathlib.Path(entry) for entry in os.scandir(folder) if HALF_FILE.fullmatch(entry.name)]:
            if is_forgotten(age, file):
                file.unlink(missing_ok=True)


def _lock_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(folder.name + LOCK)


def is_forgotten(age: float, *paths: pathlib.Path) -> bool:
    """Whether nothing about some files and in some folders has changed for so many seconds."""
    changes = [0.0]
    for path in itertools.chain(paths, *(path.rglob("*") for path in paths)):
        try:
            changes.append(path.lstat().st_mtime)
        except FileNotFoundError:
            continue
        except OSError:  # another user's: nobody knows
            return False
    return max(changes) <= time.time() - age


def put_in_place(folder: pathlib.Path, target: pathlib.Path, proof: str | None) -> None:
    """Rename a folder that has been filled beside its target; arguments and errors as those of `new_folder`."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if proof is None or not (target / proof).exists():
            raise FileExistsError(errno.EEXIST, "another process made it meanwhile", str(target)) from error


@contextlib.contextmanager
def no_empty_folders(target: pathlib.Path) -> Iterator[None]:
    """Folders that were made above a target go again where the target itself was not made."""
    stood = nearest(target.parent)
    try:
        yield
    finally:
        for parent in target.absolute().parents:
            if target.exists() or parent == stood or not _removed(parent):
                break


def _removed(folder: pathlib.Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # not empty
        return False
    return True
