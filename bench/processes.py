"""Ends what a script has started."""

from __future__ import annotations

import contextlib
import subprocess

import psutil


def kill_all(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a launcher and the processes that it started: these are in sessions of their own, and would outlive it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        every = [*launcher.children(recursive=True), launcher]
        for one in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(every)
    process.wait()
