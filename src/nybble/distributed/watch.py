"""The launcher's watch over its processes: one that stops making progress while the others wait for it is named and ended."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Mapping

import psutil

from nybble.distributed.heartbeat import RESTING, TRAINING, Progress, read_progress

PATIENCE = 600.0  # seconds without progress of any process: a save to a slow disk, a benchmark's longest item
SLOWEST = 10  # times the longest pause so far: a pause of a slow machine is not taken for the end
STARTING_SHARE = 6  # times the patience before the first micro batch is done, when no pause is known yet
STUCK = {
    psutil.STATUS_STOPPED: "it is stopped (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "a debugger has stopped it",
    psutil.STATUS_DISK_SLEEP: "it waits for a disk or a device",
}


class Watch:
    """Watches from a thread while the processes train; time in which this process itself is stopped does not count.

    Args:
        folder: where the processes write their progress.
        count: how many processes there are.
        patience: seconds without any progress after which the run is ended.
    """

    def __init__(self, folder: pathlib.Path, count: int, patience: float) -> None:
        self.stuck: dict[int, str] = {}
        """The processes that were ended, and what is known of each."""
        self.idle = 0.0
        """Seconds since the last progress."""
        self._folder = folder
        self._count = count
        self._patience = patience
        self._before: dict[int, Progress] = {}
        self._longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def look(self, passed: float) -> bool:
        """Look once, so many seconds after the last time; returns whether processes were ended."""
        now = read_progress(self._folder)
        stages = {progress.stage for progress in now.values()}
        if now != self._before or len(now) < self._count or RESTING in stages:
            self._before, self._longest, self.idle = now, max(self._longest, self.idle), 0.0
            return False
        self.idle += passed
        patience = self._patience if stages == {TRAINING} else self._patience * STARTING_SHARE
        if self.idle <= max(patience, SLOWEST * self._longest):
            return False
        self._end(now)
        return True

    def _watch(self) -> None:
        tick = min(self._patience / 20, 5.0)
        while not self._ended.wait(tick):
            if self.look(tick):
                return

    def _end(self, processes: Mapping[int, Progress]) -> None:
        self.stuck = find_stuck(processes)
        for rank in self.stuck:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(processes[rank].pid).kill()


def find_stuck(processes: Mapping[int, Progress]) -> dict[int, str]:
    """The processes for which the others wait, and what is known of each: those that are stopped, or else those behind; all of
    them if nothing tells them apart."""
    states = {rank: STUCK.get(_status(progress.pid) or "", "") for rank, progress in processes.items()}
    if stopped := {rank: state for rank, state in states.items() if state}:
        return stopped
    least = min(progress.meetings for progress in processes.values())
    return {rank: "" for rank, progress in processes.items() if progress.meetings == least}


def _status(pid: int) -> str | None:
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None
    return status
