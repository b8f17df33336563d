"""Functions run in several processes at once, which form a process group, as the ranks of a run do: over NCCL where each has a
GPU of its own, else over gloo."""

from __future__ import annotations

import datetime
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from nybble.weights import sharded

SECONDS = 120  # after which a rank that waits for another one gives up


def run_ranks(count: int, scratch: pathlib.Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function of a module in `count` new processes; returns what each returned.

    Args:
        count: number of processes.
        scratch: an empty folder.
        function: called with the arguments; what it returns must be what torch.save can write.
        arguments: the same for all.
    """
    torch.multiprocessing.spawn(_rank, (count, scratch, function, arguments), nprocs=count)
    return [torch.load(scratch / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(
    rank: int, count: int, scratch: pathlib.Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    has_own = torch.cuda.device_count() >= count
    if has_own:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if has_own else "gloo", init_method=f"file://{scratch / 'rendezvous'}", rank=rank, world_size=count,
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    sharded.GROUP_TIMEOUT = datetime.timedelta(seconds=SECONDS)
    torch.save(function(*arguments), scratch / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def explained(function: Callable[[], Any]) -> Any:
    """What a function returns, or the text of what it raised: an assertion of one rank must not leave the others waiting."""
    try:
        return function()
    except Exception:  # noqa: BLE001 - whatever it is, the test shows it
        return traceback.format_exc()
