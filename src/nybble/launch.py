"""What this process knows of the processes beside it."""

from __future__ import annotations

import os

from nybble.errors import DeviceError


def launched() -> bool:
    """Whether this process was started by torchrun or by accelerate launch."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def world_size() -> int:
    """Processes that a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def refuse_second_launcher(processes: int) -> None:
    """Raise DeviceError where a launcher is at work already and started another number of processes than asked for."""
    if launched():
        raise DeviceError(
            f"{processes} processes were asked for, and the launcher started {world_size()}",
            where=f"train.processes={processes}",
            # Without --multi_gpu, accelerate 1.15 runs one process on a CPU however many it is asked for.
            fix=f"nybble train --processes {processes}, or accelerate launch --multi_gpu --num_processes {processes}",
        )
