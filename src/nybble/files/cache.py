"""Entries of the cache: each is verified when it is read, and one that fails is made again.

An entry is a folder with a manifest (sizes and digests of its files, and facts that its maker wants back), or a note, which is
a single JSON file. Both carry a digest of their content. An entry is written under another name, read back, and renamed.
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

from nybble.errors import PlaceError
from nybble.files import digests
from nybble.files.atomic import FORGOTTEN, HALF, folder_beside, is_forgotten, put_in_place, replacing
from nybble.files.paths import ANOTHER_CACHE

MANIFEST = "manifest.json"
NAMES = 9  # names that an entry may have, in case what has the first ones can be neither used nor moved
logger = logging.getLogger(__name__)
Facts = dict[str, Any]


class DamagedError(Exception):
    """An entry is not as it was written; the message says what is wrong with it, as a clause."""


@dataclass(frozen=True)
class Entry:
    """An entry that was looked for."""

    place: pathlib.Path
    """Where it is, or where it can be made."""
    facts: Facts | None
    """What its maker recorded; None if it has to be made."""
    fault: str = ""
    """What is wrong with the one that was there, as a clause."""

    def notices(self, what: str, again: str) -> list[str]:
        """What the user should be told of a fault.

        Args:
            what: the entry and its verb: the cached rows were.
            again: what is done about it: are tokenised again.
        """
        if not self.fault:
            return []
        if self.facts is None:
            return [f"{what} damaged ({self.fault}) and {again}"]
        return [f"{what} damaged ({self.fault}) and cannot be removed: {self.place} is used instead"]


def find(folder: pathlib.Path, check: Callable[[pathlib.Path, Facts], None] = lambda *_: None) -> Entry:
    """Look for an entry and verify it; a damaged one is removed or, if that is impossible, passed over.

    Args:
        folder: its path.
        check: a further check of the folder and its facts; it raises DamagedError.

    Raises:
        PlaceError: what is there can be neither used nor moved away.
    """
    fault = ""
    for path in (folder, *(folder.with_name(f"{folder.name}.{number}") for number in range(2, NAMES + 1))):
        stood = _identity(path)
        if stood is None:
            return Entry(path, None, fault)
        try:
            facts = _proven(path)
            check(path, facts)
            return Entry(path, facts, fault)
        except DamagedError as error:
            fault = fault or str(error)
        if _identity(path) != stood:  # another process has replaced it meanwhile
            return find(folder, check)
        if discard(path):
            return Entry(path, None, fault)
    raise PlaceError(
        f"the cache contains an entry that can be neither used nor removed: {fault}",
        where=str(folder),
        fix=ANOTHER_CACHE,
    )


@contextlib.contextmanager
def making(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill and to `seal`, which then becomes the entry; if another process made it meanwhile, that one stays.

    Raises:
        FileExistsError: something else is there by now.
    """
    with filling(path.parent) as temporary:
        yield temporary
        put_in_place(temporary, path, proof=MANIFEST)


@contextlib.contextmanager
def filling(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill within one of the cache's, gone afterwards: for an entry whose name is known only once it is full.

    `seal` it then, and `put_in_place`.
    """
    make_room(folder)
    _sweep(folder)
    with folder_beside(folder / "entry") as temporary:
        temporary.chmod(0o700)  # rows are their user's own
        yield temporary


def seal(
    folder: pathlib.Path, path: pathlib.Path, facts: Mapping[str, Any], apart: frozenset[str] = frozenset()
) -> None:
    """Write the manifest of a folder's files as they read back now.

    Args:
        folder: the files, and no folders.
        path: of the entry that it becomes.
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
    """Write a note; nothing is kept if something else is at its path that cannot be replaced."""
    make_room(file.parent)
    if _identity(file) is not None and not file.is_file() and not discard(file):
        return
    said = [file.name, json.loads(json.dumps(value))]  # as it will be read: keys are text
    with contextlib.suppress(PermissionError), replacing(file) as temporary:
        temporary.write_text(json.dumps({"digest": _digest(said), "said": said}), encoding="utf-8")
        try:
            _read(temporary, file.name)
        except DamagedError as error:
            raise PlaceError(
                f"data written to the cache reads back differently ({error})", where=str(file), fix=ANOTHER_CACHE
            ) from error


def read_note(file: pathlib.Path) -> Any:
    """What a note says.

    Raises:
        FileNotFoundError: there is none.
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
    aside = path.with_name(
        f"{HALF}{secrets.token_hex(8)}"
    )  # where a kill leaves a part of it, that is removed in its turn
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return True
        path.rename(aside)
    except FileNotFoundError:
        return True
    except OSError:  # a mount, or somebody else's in a sticky folder
        return False
    with contextlib.suppress(OSError):
        aside.chmod(0o700)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def make_room(folder: pathlib.Path) -> None:
    """Make a folder of the cache; a file at its path may be the user's, so it is renamed and stays.

    Raises:
        PlaceError: there is a dangling link at its path.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if folder.is_symlink():
            raise PlaceError(
                f"{folder} is a link to {os.readlink(folder)}, which does not exist", fix=ANOTHER_CACHE
            ) from error
        aside = folder.with_name(f"{folder.name}.moved-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            if not folder.is_dir():
                folder.rename(aside)
                logger.warning("%s was a file where the cache has a folder; it is now %s", folder, aside.name)
        folder.mkdir(exist_ok=True)


def _sweep(parent: pathlib.Path) -> None:
    """Remove what killed processes of versions before 0.7 left half-written; `new_folder` removes what those of this one did."""
    for folder in parent.glob(".writing-*"):
        if is_forgotten(FORGOTTEN, folder):
            shutil.rmtree(folder, ignore_errors=True)


def _read(file: pathlib.Path, name: str) -> Any:
    """What a note says that was written under a name."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        digest, said = note["digest"], note["said"]
        own, value = said
        if digest == _digest(said) and own == name:
            return value
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{name} is garbled") from error
    raise DamagedError(f"{name} is not what was written")


def _proven(folder: pathlib.Path) -> Facts:
    """The facts of a folder whose files are as they were written.

    Raises:
        DamagedError: they are not.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder.name} is not a folder")
    try:
        manifest = read_note(folder / MANIFEST)
        sizes = (digests.size_fault(folder / name, name, size) for name, size in manifest["apart"].items())
        found = [fault for fault in sizes if fault] or digests.faults(folder, manifest["files"])
        facts, entry = manifest["facts"], manifest["entry"]
    except (LookupError, TypeError, AttributeError) as error:  # of another version of nybble
        raise DamagedError(f"{MANIFEST} has another layout") from error
    except FileNotFoundError as error:
        raise DamagedError(f"there is no {MANIFEST}, which versions before 0.7 did not write") from error
    except OSError as error:
        raise DamagedError(digests.unreadable(error)) from error
    if entry != _key(folder):
        raise DamagedError("it is a copy of another entry")
    if found:
        raise DamagedError(found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
    return dict(facts)


def _key(path: pathlib.Path) -> str:
    """An entry's name, whichever of its paths it has."""
    return path.name.partition(".")[0]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _identity(path: pathlib.Path) -> tuple[int, int, int] | None:
    """What tells an entry from the one that replaces it; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
