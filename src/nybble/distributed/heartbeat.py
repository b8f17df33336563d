"""The progress of each process, written where its launcher sees it (`nybble.distributed.watch`)."""

from __future__ import annotations

import functools
import os
import pathlib
import struct
from dataclasses import astuple, dataclass

from nybble.distributed.launcher import rank
from nybble.distributed.reports import launcher_folder

RECORD = struct.Struct("<4Q")
RESTING, STARTING, TRAINING = 0, 1, 2


@dataclass
class Progress:
    """How far a process is."""

    pid: int
    stage: int
    """RESTING outside training, STARTING before the first micro batch is done, then TRAINING."""
    beats: int
    """Signs of progress."""
    meetings: int
    """How often it has begun to wait for the others: equal for processes that are at the same point."""


class Heartbeat:
    """Writes the progress of this process; each call is one write of 32 bytes to a file that stays open."""

    def __init__(self, file: pathlib.Path) -> None:
        self.progress = Progress(os.getpid(), RESTING, 0, 0)
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        self.write()

    def write(self) -> None:
        """Write what has changed."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, RECORD.pack(*astuple(self.progress)))


def beat(*, micro_batch: bool = False) -> None:
    """Say that this process trains and goes on; `micro_batch`: it has just done one."""
    if (heart := _heartbeat()) is not None:
        heart.progress.stage = TRAINING if micro_batch else max(heart.progress.stage, STARTING)
        heart.progress.beats += 1
        heart.write()


def announce_wait() -> None:
    """Say that this process is about to wait for the others."""
    if (heart := _heartbeat()) is not None:
        heart.progress.meetings += 1
        heart.write()


def rest() -> None:
    """Say that training has ended: what follows may take any time."""
    if (heart := _heartbeat()) is not None:
        heart.progress.stage = RESTING
        heart.write()


@functools.cache
def _heartbeat() -> Heartbeat | None:
    folder = launcher_folder()
    if folder is None:
        return None
    try:
        return Heartbeat(folder / f"{rank()}.progress")
    except OSError:  # a full disk: such a run is not watched
        return None


def read_progress(folder: pathlib.Path) -> dict[int, Progress]:
    """The progress of each process of a launcher that has written any."""
    found = {int(file.stem): file.read_bytes() for file in folder.glob("*.progress")}
    return {rank: Progress(*RECORD.unpack(content)) for rank, content in found.items() if len(content) == RECORD.size}
