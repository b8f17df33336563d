"""What the processes of a run do together; every function here also works in a process that is alone.

All processes have to call the same function at the same point: one that is left out is waited for.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed

Item = TypeVar("Item")


def in_group() -> bool:
    """Whether this process has joined others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def group_size() -> int:
    """How many processes train together; 1 for a process that is alone."""
    return torch.distributed.get_world_size() if in_group() else 1


def wait_for_all() -> None:
    """Go on once every process is here."""
    if in_group():
        torch.distributed.barrier()


def add_up(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over processes; the tensor that is given holds it afterwards."""
    if in_group():
        torch.distributed.all_reduce(numbers)
    return numbers


def add_up_number(number: int, device: torch.device) -> int:
    """The sum over processes; a process that is alone does not wait for its device."""
    return int(add_up(torch.tensor(number, device=device))) if in_group() else number


def share_of(count: int) -> range:
    """Which of so many items are this process's: neighbours, and as many as any other process has, or one more or fewer."""
    if not in_group():
        return range(count)
    number, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return range(count * number // processes, count * (number + 1) // processes)


def gathered(own: list[Item]) -> list[Item]:
    """The items of all processes, the first process's first; those of `share_of` come in their old order."""
    if not in_group():
        return own
    parts: list[list[Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    return [item for part in parts for item in part]


def from_first(item: Item) -> Item:
    """What the first process has; what the others pass is ignored."""
    if not in_group():
        return item
    box = [item]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
