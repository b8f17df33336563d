"""An all-reduce over several devices, one process for each: whether its sums are right, and how fast it is.

This file is also the program of each process: it measures and writes the result as JSON to standard output.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from nybble.distributed.group import barrier
from nybble.installed import module_command

SECONDS = 120.0  # libraries load in 20 s on a slow disk, NCCL starts in 10
NUMBERS = 16 * 2**20  # of 4 bytes: 64 MiB, of which each link carries enough to show its speed
ROUNDS = 5


@dataclass(frozen=True)
class AllReduce:
    """The result of all processes."""

    gigabytes: float
    """Bus bandwidth in GB/s, as NCCL's own tests count it: what each link carries, whatever the number of devices."""
    fault: str | None = None
    """What went wrong; None if all sums are right."""


def all_reduce_over(devices: Sequence[str], numbers: int = NUMBERS, seconds: float = SECONDS) -> AllReduce:
    """Sum a tensor over devices, one process for each; processes that hang are ended.

    Args:
        devices: such as cuda:0 and cuda:1.
        numbers: how many float32 numbers are summed.
        seconds: time limit for all of it.
    """
    size = len(devices)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        processes = [
            _started(
                {"device": device, "rank": rank, "size": size, "numbers": numbers, "meeting": f"file://{folder}/meet"},
                folder / f"errors-{rank}",
            )
            for rank, device in enumerate(devices)
        ]
        try:
            ended = _wait(processes, seconds)
        finally:
            for process in processes:
                process.kill()
        outputs = [process.communicate()[0] for process in processes]
        failed = next((rank for rank, status in enumerate(ended) if status), None)  # others may wait for it
        if failed is not None:
            lines = (folder / f"errors-{failed}").read_text(errors="replace").strip().splitlines()
            return AllReduce(0.0, f"{devices[failed]}: {lines[-1][:200] if lines else f'status {ended[failed]}'}")
        if None in ended:
            return AllReduce(0.0, f"it hangs: not done after {seconds:.0f} seconds")
    results = [json.loads(output) for output in outputs]
    wrong = [device for device, result in zip(devices, results, strict=True) if not result["right"]]
    slowest = max(result["seconds"] for result in results)
    moved = 2 * (size - 1) / size * numbers * 4
    return AllReduce(moved / slowest / 1e9, f"wrong sums on {', '.join(wrong)}" if wrong else None)


def _started(job: dict[str, Any], errors: pathlib.Path) -> subprocess.Popen[str]:
    """One of the processes; what it says goes to a file, which unlike a pipe is never full."""
    command = module_command("nybble.preflight.doctor.all_reduce", json.dumps(job))
    with errors.open("w") as stream:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)


def _wait(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[int | None]:
    """Wait until all have ended, one has failed, or time is up; returns the statuses, None for those that run."""
    end = time.monotonic() + seconds
    while True:
        ended = [process.poll() for process in processes]
        if None not in ended or any(ended) or time.monotonic() > end:
            return ended
        time.sleep(0.05)


def measure(device: torch.device, rank: int, size: int, numbers: int, meeting: str) -> tuple[bool, float]:
    """In one of the processes: whether the sum is right everywhere, and the seconds of an all-reduce."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=SECONDS)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=meeting, rank=rank, world_size=size, timeout=limit
    )
    whole = torch.arange(numbers, device=device) % 97 + rank  # small whole numbers, whose sums are exact
    summed = whole.float()
    torch.distributed.all_reduce(summed)
    expected = (torch.arange(numbers, device=device) % 97) * size + size * (size - 1) // 2
    is_right = bool(torch.equal(summed, expected.float()))
    work = torch.zeros(numbers, device=device)
    barrier()
    started = time.perf_counter()
    for _ in range(ROUNDS):
        torch.distributed.all_reduce(work)
    work[0].item()  # wait for the device
    seconds = (time.perf_counter() - started) / ROUNDS
    barrier()
    torch.distributed.destroy_process_group()
    return is_right, seconds


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    right, taken = measure(
        torch.device(given["device"]), given["rank"], given["size"], given["numbers"], given["meeting"]
    )
    json.dump({"right": right, "seconds": taken}, sys.stdout)
