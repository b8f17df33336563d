"""Where nybble reads and writes: the cache, which folders are writable, files that are whole or not there, full disks."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import pathlib
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence

from nybble.errors import ExportError, NybbleError, PlaceError, RunError
from nybble.files.locks import hold, holder, of_the_dead, refuse_held
from nybble.terminal import bytes_text

ANOTHER_CACHE = "nybble --cache FOLDER COMMAND ..., or set XDG_CACHE_HOME to a writable folder"
REPORT = "parity.json"  # in each export
PROBE = 4096  # bytes: a file of none can be made on a full disk
LOCK = ".lock"  # in a run while it is written
HALF = ".nybble-writing-"  # a folder being filled or removed; beside it, with .lock at the end, its writer's lock
HALF_FILE = re.compile(r"\..+\.[0-9a-f]{8}\.writing(\.[^.]+)?")  # a file that is being written
FORGOTTEN = 24 * 3600  # seconds without a change, after which nobody is taken to be writing where that cannot be known
FULL = (errno.ENOSPC, errno.EDQUOT)
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


def default_cache() -> pathlib.Path:
    """Where quantised bases, tokenised data, digests, scores and the embedded model are kept: $XDG_CACHE_HOME/nybble, or
    ~/.cache/nybble.

    Raises:
        PlaceError: neither is set, and this user has no home folder.
    """
    asked = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(asked):  # the standard wants others to be ignored
        return pathlib.Path(asked) / "nybble"
    try:
        return pathlib.Path.home() / ".cache" / "nybble"
    except RuntimeError as error:
        raise PlaceError("there is no home folder to keep the cache in: HOME is not set", fix=ANOTHER_CACHE) from error


def lend_home(cache: pathlib.Path | None) -> None:
    """Let libraries keep in the cache what they keep in a home folder, where this user has none: nltk fails to load without."""
    if os.path.expanduser("~") == "~":
        with contextlib.suppress(PlaceError):  # a command that needs a cache says so
            os.environ["HOME"] = str(cache or default_cache())


def nearest(folder: pathlib.Path) -> pathlib.Path:
    """The folder itself, or the nearest above it that exists and may be looked at."""
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if os.path.exists(parent))


def check_here() -> None:
    """Refuse to begin in a folder that is gone, where no relative path means anything.

    Raises:
        PlaceError: it is gone.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise PlaceError("the current folder was removed or moved", fix='cd "$PWD", or cd to another folder') from error


def check_cache(cache: pathlib.Path) -> None:
    """Refuse a cache that cannot be written to, or that contains folders of another user.

    Raises:
        PlaceError: with the reason.
    """
    check_writable(cache, "the cache", ANOTHER_CACHE)
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if folder.is_dir():
            check_writable(folder, "the cache", ANOTHER_CACHE)


def check_places(run: pathlib.Path, cache: pathlib.Path) -> None:
    """Refuse a run folder or a cache that cannot be written, before anything is loaded.

    Raises:
        PlaceError: with the reason.
    """
    check_writable(run, "the run", "out=FOLDER, in a writable location")
    check_cache(cache)


def check_report(run: pathlib.Path) -> None:
    """Refuse a run into which `nybble eval` cannot write its report.

    Raises:
        PlaceError: with the reason.
        RunError: another process writes it.
    """
    refuse_busy(run)
    fix = f"evaluate a copy: cp -r {run} FOLDER, then nybble eval FOLDER"
    check_writable(run, "the report, which is kept in the run,", fix)
    if (run / "report").is_dir():
        check_writable(run / "report", "the report's pictures", fix)


def check_export(target: pathlib.Path) -> None:
    """Refuse a path where an export cannot be made: something is there, or nothing can be written.

    Raises:
        ExportError: something is there, and an export is never overwritten.
        PlaceError: nothing can be written, with the reason.
        RunError: another process is about to put something there.
    """
    if os.path.lexists(target):
        is_export = (target / REPORT).is_file()  # anything else may be a run or a base: nobody is told to remove it
        remove = f", or remove the one that is there: rm -r {shlex.quote(str(target))}" if is_export else ""
        raise ExportError(f"{target} exists already", fix=f"--out ANOTHER{remove}")
    for lock in target.parent.glob(f"{HALF}*{LOCK}"):
        if (held := holder(lock)) is not None and held.place == os.path.realpath(target):
            refuse_held(lock, target)
    check_writable(target, "the export", "--out FOLDER, in a writable location")


def check_writable(folder: pathlib.Path, what: str, fix: str) -> None:
    """Refuse a folder, which need not exist yet, that cannot be written to: a small file is tried.

    Args:
        folder: the folder.
        what: what would be written there, as the message says it.
        fix: how to have it somewhere else.

    Raises:
        PlaceError: with the reason.
    """
    path = nearest(folder)
    try:
        _refuse_odd(folder)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(PROBE))
            probe.flush()
    except OSError as error:
        raise PlaceError(f"{what} cannot be written: {_why(error, path)}", where=str(folder), fix=fix) from error


def _refuse_odd(folder: pathlib.Path) -> None:
    """Raise OSError for a name that is too long, and for a link on the way that leads nowhere, as to a disk that is gone."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if os.path.islink(path) and not os.path.exists(path):
            raise OSError(errno.ENOENT, f"{path} is a link to {os.readlink(path)}, which does not exist")
    longest = max(len(os.fsencode(part)) for part in (*folder.parts, "."))
    if longest > (os.pathconf(nearest(folder), "PC_NAME_MAX") if hasattr(os, "pathconf") else 255):  # on Windows
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def check_disk(folder: pathlib.Path, size: int, what: str, fix: str) -> None:
    """Refuse if the disk of a folder, which need not exist, does not have this many bytes free.

    Raises:
        RunError: with the bytes needed and free.
    """
    path = nearest(folder)
    free = shutil.disk_usage(path).free
    if free < size:
        raise RunError(
            f"{what} needs about {bytes_text(size)}, but only {bytes_text(free)} are free",
            where=str(path),
            fix=fix,
        )


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


def _why(error: OSError, path: pathlib.Path) -> str:
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
    if error.errno in FULL:
        return f"the disk that holds {path} is full"
    return f"{path}: {error.strerror}"
