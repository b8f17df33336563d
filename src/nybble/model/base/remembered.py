"""SHA-256 of weight files, remembered with an XXH3 digest, which verifies the bytes in a tenth of the time."""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import pathlib
import re
import shlex
from collections.abc import Sequence

import xxhash

from nybble.errors import ModelError
from nybble.files import cache as entries

VERSION = 2  # before, a note was the bare digest, believed by size and time of change
CHUNK = 1 << 24  # bytes read at once
THREADS = 4  # files read at once
logger = logging.getLogger(__name__)


def sha256_of(files: Sequence[pathlib.Path], cache: pathlib.Path, *, prove: bool) -> list[str]:
    """SHA-256 of each file, from notes where these can be believed.

    A note is believed of a file whose size, inode, time of change and time of status are as they were: the last, ctime, moves
    with every write and cannot be set back as the time of change can. Otherwise the bytes are held against the note's XXH3,
    and are hashed anew only if that differs.

    Args:
        files: weight files.
        cache: where the notes lie.
        prove: believe no note.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda file: _sha256(file, cache, prove), files))


def check_download(file: pathlib.Path, digest: str) -> None:
    """Hold a file in the Hub's cache against its name there, which is its SHA-256 as the Hub says it.

    Raises:
        ModelError: the file is damaged.
    """
    real = file.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name) and real.name != digest:
        raise ModelError(
            f"{file.name} is damaged: its SHA-256 is {digest[:16]}..., and the Hub's is {real.name[:16]}...",
            where=str(real),
            fix=f"rm {shlex.join((str(file), str(real)))}, and run the command again: it downloads the file",
        )


def _sha256(file: pathlib.Path, cache: pathlib.Path, prove: bool) -> str:
    real, now = file.resolve(), _status(file)
    note = cache / "digests" / hashlib.sha256(repr((VERSION, str(real))).encode()).hexdigest()
    known = _recall(note, real)
    if known is not None and known["size"] == now["size"]:
        if not prove and now.items() <= known.items():
            return str(known["sha256"])
        if _hashed(file, xxhash.xxh3_128()) == [known["xxh3"]]:
            if not now.items() <= known.items():
                entries.write_note(note, {**known, **now})
            return str(known["sha256"])
        if known["mtime"] == now["mtime"]:
            logger.warning("%s changed, although its size and its time did not", file)
    sha256, xxh3 = _hashed(file, hashlib.sha256(), xxhash.xxh3_128())
    entries.write_note(note, {**now, "sha256": sha256, "xxh3": xxh3})
    return sha256


def _recall(note: pathlib.Path, file: pathlib.Path) -> dict[str, str | int] | None:
    try:
        known: dict[str, str | int] = entries.read_note(note)
    except FileNotFoundError:
        return None
    except entries.DamagedError as fault:
        logger.warning("what was remembered of %s was damaged (%s): it is read again", file, fault)
        return None
    return known


def _status(file: pathlib.Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns, "inode": status.st_ino}


def _hashed(file: pathlib.Path, *kinds: hashlib._Hash | xxhash.xxh3_128) -> list[str]:
    """Digests of a file in one reading, which lets other threads run."""
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            for kind in kinds:
                kind.update(buffer[:count])
    return [kind.hexdigest() for kind in kinds]
