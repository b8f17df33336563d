"""Several GPUs of one machine: whether they reach each other's memory, NCCL's version, and the speed of an all-reduce."""

from __future__ import annotations

import itertools

import torch

from nybble.preflight.doctor.all_reduce import AllReduce, all_reduce_over
from nybble.preflight.doctor.finding import Finding


def links(names: list[str]) -> list[Finding]:
    """What training with several processes needs of these GPUs; nothing with fewer than two."""
    if len(names) < 2:
        return []
    unreachable = [
        (a, b)
        for a, b in itertools.combinations(range(len(names)), 2)
        if not (torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a))
    ]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return [
        judge_peers(len(names), unreachable),
        judge_nccl(nccl),
        *([judge_all_reduce(names, all_reduce_over(names))] if nccl is not None else []),
    ]


def judge_peers(count: int, unreachable: list[tuple[int, int]]) -> Finding:
    """Whether each pair of GPUs can read each other's memory directly.

    Args:
        count: the number of GPUs.
        unreachable: the pairs that cannot.
    """
    pairs = count * (count - 1) // 2
    if not unreachable:
        return Finding("peer access", "ok", f"between all {count} GPUs" if count > 2 else "between both GPUs")
    listed = ", ".join(f"{a} and {b}" for a, b in unreachable[:6]) + (", ..." if len(unreachable) > 6 else "")
    return Finding(
        "peer access", "warn", f"none in {len(unreachable)} of {pairs} pairs of GPUs ({listed}): they exchange through the host",
        "`nvidia-smi topo -p2p r` says why; training works without it, more slowly",
    )  # fmt: skip


def judge_nccl(version: tuple[int, ...] | None) -> Finding:
    """NCCL's version; None if this torch has none."""
    if version is None:
        return Finding(
            "nccl", "fail", "torch was built without NCCL: several GPUs cannot train together", "a Linux build"
        )
    return Finding("nccl", "ok", ".".join(map(str, version)))


def judge_all_reduce(names: list[str], result: AllReduce) -> Finding:
    """Whether all GPUs sum a tensor together, and how fast."""
    if result.fault is not None:
        return Finding(
            "all-reduce", "fail", f"over {len(names)} GPUs: {result.fault}",
            "try NCCL_P2P_DISABLE=1 nybble doctor: if it then passes, set NCCL_P2P_DISABLE=1 for training too; "
            "NCCL_DEBUG=INFO says more",
        )  # fmt: skip
    return Finding("all-reduce", "ok", f"over {len(names)} GPUs: right sums, {result.gigabytes:.1f} GB/s")
