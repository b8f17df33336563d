"""Start one process a device, or recognise that somebody's launcher has done so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from nybble.errors import DeviceError


def launched() -> bool:
    """Whether this process was started by torchrun or by accelerate launch."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def world_size() -> int:
    """Processes that a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process speaks for all: errors are printed once."""
    return os.environ.get("RANK", "0") == "0"


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `nybble WORDS` in so many processes on this machine by torchrun; returns the exit status.

    Raises:
        DeviceError: a launcher is at work already, and started another number of processes.
    """
    if launched():
        running = world_size()
        raise DeviceError(
            f"{processes} processes were asked for, and the launcher started {running}",
            where=f"train.processes={processes}",
            # Without --multi_gpu, accelerate 1.15 runs one process on a CPU however many it is asked for.
            fix=f"nybble train --processes {processes}, or accelerate launch --multi_gpu --num_processes {processes}",
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # Each process says what went wrong itself; torchrun's own report of it is noise.
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": os.devnull, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run([*command, "-m", "nybble", *words], env=environment, check=False).returncode
