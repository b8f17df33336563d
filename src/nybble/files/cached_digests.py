"""SHA-256 of large files, cached with an XXH3 digest, which verifies the bytes in a tenth of the time."""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import xxhash

from nybble.files import cache as entries

VERSION = 2  # in version 1 a note was the digest alone, and it was trusted if size and mtime were the same
CHUNK = 1 << 24  # bytes read at once
THREADS = 4  # files read at once
logger = logging.getLogger(__name__)


def sha256_of(files: Sequence[pathlib.Path], notes: pathlib.Path, *, prove: bool) -> list[str]:
    """SHA-256 of each file, from the cache's notes where these can be trusted.

    A note is trusted if the file's size, inode, mtime and ctime are the same: ctime changes with every write and, unlike mtime,
    cannot be set back. Otherwise the bytes are compared with the note's XXH3 digest; SHA-256 is computed only if that differs.

    Args:
        files: the files.
        notes: folder of the notes.
        prove: trust no note without reading the file.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda file: _sha256(file, notes, prove), files))


def recall(file: pathlib.Path, notes: pathlib.Path) -> dict[str, Any] | None:
    """The note of a file, by its path: the file's status at that time and its digests; None if there is no note."""
    try:
        known: dict[str, Any] = entries.read_note(_note(file, notes))
    except FileNotFoundError:
        return None
    except entries.DamagedError as fault:
        logger.warning("the cached digests of %s were damaged (%s): the file is read again", file.resolve(), fault)
        return None
    return known


def remember(file: pathlib.Path, notes: pathlib.Path, status: os.stat_result, sha256: str, xxh3: str) -> None:
    """Save the digests of a file that had this status both before and after it was read."""
    entries.write_note(_note(file, notes), {**_facts(status), "sha256": sha256, "xxh3": xxh3})


def is_unchanged(known: dict[str, Any], status: os.stat_result) -> bool:
    """Whether a file with this status is the same as when its note was written."""
    return _facts(status).items() <= known.items()


def _sha256(file: pathlib.Path, notes: pathlib.Path, prove: bool) -> str:
    known, now = recall(file, notes), file.stat()
    if known is not None and known["size"] == now.st_size:
        if not prove and is_unchanged(known, now):
            return str(known["sha256"])
        if _hashed(file, xxhash.xxh3_128()) == [known["xxh3"]]:
            if not is_unchanged(known, now):
                remember(file, notes, now, known["sha256"], known["xxh3"])
            return str(known["sha256"])
        if known["mtime"] == now.st_mtime_ns:
            logger.warning("%s changed, although its size and modification time did not", file)
    sha256, xxh3 = _hashed(file, hashlib.sha256(), xxhash.xxh3_128())
    remember(file, notes, now, sha256, xxh3)
    return sha256


def _note(file: pathlib.Path, notes: pathlib.Path) -> pathlib.Path:
    return notes / hashlib.sha256(repr((VERSION, str(file.resolve()))).encode()).hexdigest()


def _facts(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns, "inode": status.st_ino}


def _hashed(file: pathlib.Path, *kinds: hashlib._Hash | xxhash.xxh3_128) -> list[str]:
    """Digests of a file, read once; other threads can run meanwhile."""
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            for kind in kinds:
                kind.update(buffer[:count])
    return [kind.hexdigest() for kind in kinds]
