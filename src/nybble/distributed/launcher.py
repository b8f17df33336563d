"""What this process knows of the processes beside it."""

from __future__ import annotations

import os

from nybble.errors import DeviceError

# How threads of GNU's OpenMP, which torch brings, wait for each other. By default each spins for 300,000 rounds; where another
# process wants the cores, those that it waits for cannot run meanwhile (bench/busy.py: what each way costs).
WAITING = {"GOMP_SPINCOUNT": "100000"}


def wait_without_spinning() -> None:
    """Have this process's threads, and those of processes that it starts, leave the cores to others while they wait.

    The library reads its environment when it is loaded: this comes before torch. What somebody has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(WAITING)


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
            f"{processes} processes were requested, but the launcher started {world_size()}",
            where=f"train.processes={processes}",
            # Without --multi_gpu, accelerate 1.15 runs one process on a CPU however many it is asked for.
            fix=f"nybble train --processes {processes}, or accelerate launch --multi_gpu --num_processes {processes}",
        )
