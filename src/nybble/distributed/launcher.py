"""The launcher's environment variables: which process this is, and of how many."""

from __future__ import annotations

import os

from nybble.errors import DeviceError

# How threads of GNU's OpenMP, which comes with torch, wait for each other. By default each spins for 300,000 rounds; while they
# spin, threads that they wait for may get no core if other processes need the cores too (bench/busy.py measures both settings).
SPIN_SETTINGS = {"GOMP_SPINCOUNT": "100000"}


def wait_without_spinning() -> None:
    """Make the threads of this process, and of processes that it starts, leave the cores to others while they wait.

    The library reads its environment when it is loaded, so call this before torch is imported. Existing settings stay.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(SPIN_SETTINGS)


def is_launched() -> bool:
    """Whether this process was started by torchrun or by accelerate launch."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def refuse_second_launcher(processes: int) -> None:
    """Raise DeviceError where a launcher started this process, but not as many processes as were requested."""
    if is_launched():
        raise DeviceError(
            f"{processes} processes were requested, but the launcher started {world_size()}",
            where=f"train.processes={processes}",
            # Without --multi_gpu, accelerate 1.15 runs one process on a CPU, however many are requested.
            fix=f"nybble train --processes {processes}, or accelerate launch --multi_gpu --num_processes {processes}",
        )
