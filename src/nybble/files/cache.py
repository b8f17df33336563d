"""Entries of the cache: each is verified when it is read, and made again if that fails.

An entry is a folder with a manifest (sizes and digests of its files, and facts for its maker), or a note, which is a single
JSON file. Both contain a digest of their content. An entry is written under another name, read back, and renamed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from nybble.errors import StorageError
from nybble.files import digests
from nybble.files.atomic import ABANDONED_AFTER, UNFINISHED, is_abandoned, put_in_place, replacing, temporary_folder
from nybble.files.paths import ANOTHER_CACHE

MANIFEST = "manifest.json"
NAMES = 9  # names that an entry may have, in case what is at the first ones can be neither used nor moved
logger = logging.getLogger(__name__)
Facts = dict[str, Any]


class DamagedError(Exception):
    """An entry is not as it was written; the message is a clause that says what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """The result of a look-up."""

    path: pathlib.Path
    """Where the entry is, or where it can be made."""
    facts: Facts | None
    """What its maker recorded; None if it has to be made."""
    fault: str = ""
    """What is wrong with the entry that was there, as a clause."""

    def notices(self, what: str, again: str) -> list[str]:
        """The message for the user about a fault, if there is one.

        Args:
            what: the entry and its verb: the cached rows were.
            again: what happens next: are tokenised again.
        """
        if not self.fault:
            return []
        if self.facts is None:
            return [f"{what} damaged ({self.fault}) and {again}"]
        return [f"{what} damaged ({self.fault}) and cannot be removed: {self.path} is used instead"]


def find(folder: pathlib.Path, check: Callable[[pathlib.Path, Facts], None] = lambda *_: None) -> Entry:
    """Look up an entry and verify it; a damaged one is removed or, if that is impossible, skipped.

    Args:
        folder: the entry's path.
        check: a further check of the folder and its facts; it raises DamagedError.

    Raises:
        StorageError: what is there can be neither used nor moved away.
    """
    fault = ""
    for path in (folder, *(folder.with_name(f"{folder.name}.{number}") for number in range(2, NAMES + 1))):
        identity = _identity(path)
        if identity is None:
            return Entry(path, None, fault)
        try:
            facts = _verified_facts(path)
            check(path, facts)
            return Entry(path, facts, fault)
        except DamagedError as error:
            fault = fault or str(error)
        if _identity(path) != identity:  # another process has replaced it in the meantime
            return find(folder, check)
        if discard(path):
            return Entry(path, None, fault)
    raise StorageError(
        f"the cache contains an entry that can be neither used nor removed: {fault}",
        where=str(folder),
        fix=ANOTHER_CACHE,
    )


@contextlib.contextmanager
def new_entry(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill and to `seal`, which then becomes the entry, unless another process has made the entry by then.

    Raises:
        FileExistsError: something else is there by now.
    """
    with temporary_entry(path.parent) as temporary:
        yield temporary
        put_in_place(temporary, path, marker=MANIFEST)


@contextlib.contextmanager
def temporary_entry(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill inside a folder of the cache, removed afterwards: for an entry whose name depends on its content.

    Once it is full, `seal` it and `put_in_place`.
    """
    make_folder(folder)
    _remove_old_leftovers(folder)
    with temporary_folder(folder / "entry") as temporary:
        temporary.chmod(0o700)  # training rows are private to their user
        yield temporary


def seal(
    folder: pathlib.Path, path: pathlib.Path, facts: Mapping[str, Any], apart: frozenset[str] = frozenset()
) -> None:
    """Write the manifest of a folder's files from what they contain when read back.

    Args:
        folder: it contains files only, no folders.
        path: the path of the entry that it becomes.
        facts: what its maker wants back, as JSON.
        apart: names of files that `facts` verify by other means.
    """
    files = {
        file.name: {"size": file.stat().st_size, "digest": digests.digest(file)}
        for file in sorted(folder.iterdir())
        if file.name not in apart
    }
    sizes = {name: (folder / name).stat().st_size for name in sorted(apart)}
    write_note(folder / MANIFEST, {"entry": _key(path), "files": files, "apart": sizes, "facts": facts})


def write_note(file: pathlib.Path, value: Any) -> None:
    """Write a note; nothing is written if its path is occupied by something that cannot be replaced."""
    make_folder(file.parent)
    if _identity(file) is not None and not file.is_file() and not discard(file):
        return
    content = [file.name, json.loads(json.dumps(value))]  # as it will be read: with text as keys
    with contextlib.suppress(PermissionError), replacing(file) as temporary:
        temporary.write_text(json.dumps({"digest": _digest(content), "said": content}), encoding="utf-8")
        try:
            _read(temporary, file.name)
        except DamagedError as error:
            raise StorageError(
                f"data written to the cache reads back differently ({error})", where=str(file), fix=ANOTHER_CACHE
            ) from error


def read_note(file: pathlib.Path) -> Any:
    """The value of a note.

    Raises:
        FileNotFoundError: there is no note.
        DamagedError: it is not what was written.
    """
    try:
        if _identity(file) is None:
            raise FileNotFoundError(str(file))
        if not file.is_file():
            raise DamagedError(f"{file.name} is not a file")
    except PermissionError as error:
        raise DamagedError(f"{file.name} cannot be read: {error.strerror}") from error
    return _read(file, file.name)


def discard(path: pathlib.Path) -> bool:
    """Remove whatever is at an entry's path, or else move it aside. False if neither works."""
    # If the process is killed here, the folder is removed later like any other unfinished one.
    aside = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return True
        path.rename(aside)
    except FileNotFoundError:
        return True
    except OSError:  # a mount point, or another user's entry in a sticky folder
        return False
    with contextlib.suppress(OSError):
        aside.chmod(0o700)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder of the cache; a file at its path may belong to the user, so it is renamed, not removed.

    Raises:
        StorageError: there is a dangling link at its path.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if folder.is_symlink():
            raise StorageError(
                f"{folder} is a link to {os.readlink(folder)}, which does not exist", fix=ANOTHER_CACHE
            ) from error
        aside = folder.with_name(f"{folder.name}.moved-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            if not folder.is_dir():
                folder.rename(aside)
                logger.warning("%s was a file where the cache has a folder; it is now %s", folder, aside.name)
        folder.mkdir(exist_ok=True)


def _remove_old_leftovers(parent: pathlib.Path) -> None:
    """Remove what killed processes of versions before 0.7 left unfinished; `new_folder` does so for this version."""
    for folder in parent.glob(".writing-*"):
        if is_abandoned(ABANDONED_AFTER, folder):
            shutil.rmtree(folder, ignore_errors=True)


def _read(file: pathlib.Path, name: str) -> Any:
    """The value of a note that was written under a name."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        digest, content = note["digest"], note["said"]
        written_name, value = content
        if digest == _digest(content) and written_name == name:
            return value
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{name} is garbled") from error
    raise DamagedError(f"{name} is not what was written")


def _verified_facts(folder: pathlib.Path) -> Facts:
    """The facts of a folder whose files are as they were written.

    Raises:
        DamagedError: they are not.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder.name} is not a folder")
    try:
        manifest = read_note(folder / MANIFEST)
        sizes = (digests.size_fault(folder / name, name, size) for name, size in manifest["apart"].items())
        faults = [fault for fault in sizes if fault] or digests.faults(folder, manifest["files"])
        facts, entry = manifest["facts"], manifest["entry"]
    except (LookupError, TypeError, AttributeError) as error:  # another version of nybble wrote it
        raise DamagedError(f"{MANIFEST} has another layout") from error
    except FileNotFoundError as error:
        raise DamagedError(f"there is no {MANIFEST}, which versions before 0.7 did not write") from error
    except OSError as error:
        raise DamagedError(digests.unreadable(error)) from error
    if entry != _key(folder):
        raise DamagedError("it is a copy of another entry")
    if faults:
        raise DamagedError(faults[0] + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
    return dict(facts)


def _key(path: pathlib.Path) -> str:
    """An entry's name, whichever of its possible paths it is at."""
    return path.name.partition(".")[0]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _identity(path: pathlib.Path) -> tuple[int, int, int] | None:
    """What distinguishes an entry from one that replaces it; None if there is no entry."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
