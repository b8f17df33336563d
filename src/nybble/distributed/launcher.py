"""What a launcher has told this process about the others."""

from __future__ import annotations

import os

from nybble.errors import DeviceError

# How threads of GNU's OpenMP, which torch brings, wait for each other. By default each spins for 300,000 rounds; where another
# process wants the cores, the threads that are waited for cannot run meanwhile (bench/busy.py: what each way costs).
WAITING = {"GOMP_SPINCOUNT": "100000"}


def wait_without_spinning() -> None:
    """Have the threads of this process, and of processes that it starts, leave the cores to others while they wait.

    The library reads its environment when it is loaded, so call this before torch is imported. What is set already stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(WAITING)


def launched() -> bool:
    """Whether this process was started by torchrun or by accelerate launch."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def world_size() -> int:
    """Number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all of them; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def refuse_second_launcher(processes: int) -> None:
    """Raise DeviceError where a launcher started this process, and others, but not as many as were requested."""
    if launched():
        raise DeviceError(
            f"{processes} processes were requested, but the launcher started {world_size()}",
            where=f"train.processes={processes}",
            # Without --multi_gpu, accelerate 1.15 runs one process on a CPU however many it is asked for.
            fix=f"nybble train --processes {processes}, or accelerate launch --multi_gpu --num_processes {processes}",
        )
