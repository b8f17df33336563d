"""Files of the first process's folder, for processes on machines that do not have it.

They go through the store at which the processes meet, before there is a process group: the recipe, which decides its devices, is
one of them. Nothing but the launcher's own connection is needed.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence

from torch.distributed import Store  # type: ignore[attr-defined]

from nybble.distributed.launcher import ProcessPlace
from nybble.distributed.meeting import meet
from nybble.errors import LostProcessError, NybbleError

PART = 4 * 2**20  # bytes; the store takes 8 MiB at a time


@contextlib.contextmanager
def folder_at_hand(
    folder: pathlib.Path, choose: Callable[[], Sequence[pathlib.Path]], place: ProcessPlace
) -> Iterator[pathlib.Path]:
    """The folder in which this process finds the first one's files: that folder, if it sees it, or else a temporary copy.

    All processes must call this. A folder of the same path that is not the first process's own is not used.

    Args:
        folder: its path.
        choose: names the files to be sent; only the first process calls it.
        place: of this process.

    Raises:
        LostProcessError: the first process cannot choose files; its own error is the reason.
    """
    store = meet(place, "resuming")  # kept to the end
    if not place.rank:
        _offer(store, folder, choose, place.size)
        yield folder
        return
    offer = json.loads(store.get("offer"))
    if "refused" in offer:
        raise LostProcessError(f"process 0 ends, and this one with it: {offer['refused']}")
    is_seen = (folder / offer["probe"]).exists()
    store.set(f"needs-{place.rank}", "" if is_seen else "files")
    if is_seen:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary) / folder.name
        for name in offer["files"]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            with (copy / name).open("wb") as stream:
                for part in _received(store, name, place.rank):
                    stream.write(part)
        with _named(folder, copy):
            yield copy


@contextlib.contextmanager
def _named(folder: pathlib.Path, copy: pathlib.Path) -> Iterator[None]:
    """Errors name the folder, not the copy, which is gone by then."""
    try:
        yield
    except NybbleError as error:
        for name in ("what", "where", "fix"):
            if (text := getattr(error, name)) is not None:
                setattr(error, name, text.replace(str(copy), str(folder)))
        raise


def _offer(store: Store, folder: pathlib.Path, choose: Callable[[], Sequence[pathlib.Path]], size: int) -> None:
    """In the first process: name the files, see who does not see them, and send them to those."""
    # Named like a file that is being written, which the next process that locks the run would remove after a kill.
    probe = folder / f".seen.{secrets.token_hex(4)}.writing"
    try:
        files = choose()
        probe.touch()
    except (NybbleError, OSError) as error:
        store.set("offer", json.dumps({"refused": error.what if isinstance(error, NybbleError) else str(error)}))
        raise
    try:
        names = [file.relative_to(folder).as_posix() for file in files]
        store.set("offer", json.dumps({"probe": probe.name, "files": names}))
        receivers = [rank for rank in range(1, size) if store.get(f"needs-{rank}")]
    finally:
        probe.unlink()
    for file, name in zip(files, names, strict=True) if receivers else ():
        _send(store, file, name, receivers)


def _send(store: Store, file: pathlib.Path, name: str, receivers: Sequence[int]) -> None:
    """Send a file in parts, of which the store holds one at a time; an empty one ends it."""
    with file.open("rb") as stream:
        for number, part in enumerate(iter(lambda: stream.read(PART), None)):
            store.set(f"{name}-{number}", part)  # type: ignore[arg-type]  # bytes as they are
            for rank in receivers:
                store.get(f"{name}-{number}-{rank}")
            store.delete_key(f"{name}-{number}")
            if not part:
                return


def _received(store: Store, name: str, rank: int) -> Iterator[bytes]:
    number = 0
    while part := store.get(f"{name}-{number}"):
        store.set(f"{name}-{number}-{rank}", "taken")
        yield part
        number += 1
    store.set(f"{name}-{number}-{rank}", "taken")
