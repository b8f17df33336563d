"""What the processes of a run do together; every function also works in a single process.

All processes must call the same function at the same point: the others wait for one that does not.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed

from nybble.distributed.heartbeat import announce_wait
from nybble.errors import DeviceError, LostProcessError

Item = TypeVar("Item")
LOST = re.compile(r"reset|closed|refused|broken pipe|time[sd]? ?out|timeout|remote error|abort", re.IGNORECASE)
"""What libraries say of a connection to a process that is gone."""
GROUP_TIMEOUT = datetime.timedelta(hours=6)
"""How long processes wait for each other: the first on each machine downloads, quantises and tokenises meanwhile, for which
NCCL's default of 10 minutes is too short. The launcher notices one that hangs earlier (`nybble.distributed.watch`)."""


def in_group() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def group_size() -> int:
    """How many processes train together; 1 for a single process."""
    return torch.distributed.get_world_size() if in_group() else 1


def barrier() -> None:
    """Wait until every process has called this."""
    if in_group():
        announce_wait()
        # NCCL's guesses the device otherwise, and says so on the terminal
        devices = [torch.cuda.current_device()] if torch.distributed.get_backend() == "nccl" else None
        torch.distributed.barrier(device_ids=devices)


def all_reduce(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over processes, which is also written into the tensor itself."""
    if in_group():
        announce_wait()
        torch.distributed.all_reduce(numbers)
    return numbers


def all_reduce_number(number: int, device: torch.device) -> int:
    """The sum over processes; a single process does not wait for its device."""
    return int(all_reduce(torch.tensor(number, device=device))) if in_group() else number


def ranks_by_machine() -> list[list[int]]:
    """The ranks of each machine, by its host name; a single process is alone on its own."""
    machines: dict[str, list[int]] = {}
    for rank, machine in enumerate(all_gather([platform.node()])):
        machines.setdefault(machine, []).append(rank)
    return list(machines.values())


def ranks_that_share() -> list[list[int]]:
    """The groups of ranks that each hold one copy of what is spread over processes: those of a machine, since the network between
    machines is slower; all ranks together, if a machine has only one."""
    machines = ranks_by_machine()
    return machines if all(len(ranks) > 1 for ranks in machines) else [list(range(group_size()))]


def own_of(groups: Sequence[Sequence[int]]) -> int:
    """Which of several groups of ranks this process belongs to."""
    own = torch.distributed.get_rank() if in_group() else 0
    return next(number for number, ranks in enumerate(groups) if own in ranks)


def share_of(count: int) -> range:
    """The indices of this process's share of so many items: contiguous, and in size at most one apart from any other share."""
    if not in_group():
        return range(count)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return range(count * rank // processes, count * (rank + 1) // processes)


def all_gather(items: list[Item]) -> list[Item]:
    """The items of all processes, in the order of their ranks; shares by `share_of` are in their original order again."""
    if not in_group():
        return items
    parts: list[list[Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    announce_wait()
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast(item: Item) -> Item:
    """The item of the first process; what the others pass is ignored."""
    if not in_group():
        return item
    box = [item]
    announce_wait()
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def explained_lost_process() -> Iterator[None]:
    """Turn the error of an exchange with a process that has ended into one message.

    Raises:
        LostProcessError: another process has ended; its own output says why.
        DeviceError: the exchange failed for another reason.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own for its errors, only its source's path in them.
        of_gloo = in_group() and "/gloo/" in str(error)
        if not (isinstance(error, torch.distributed.DistError) or of_gloo):
            raise
        lines = str(error).splitlines()
        reason = lines[0].rpartition("] ")[2][:160]
        again = "nybble train --resume RUN, if there is a checkpoint"
        if isinstance(error, torch.distributed.DistNetworkError) or LOST.search(reason):
            raise LostProcessError(
                f"another process of this run has ended, or cannot be reached: {reason}",
                fix=f"see what the other processes say; once that is repaired: {again}",
            ) from error
        last = f"; {lines[-1][:160]}" if len(lines) > 1 else ""  # NCCL's own reason
        raise DeviceError(
            f"an exchange between the processes failed: {reason}{last}", fix=f"nybble doctor; then {again}"
        ) from error
