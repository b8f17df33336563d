"""Weights spread over the ranks of a machine: each holds a share of every decoder layer's bytes, on its device or on the host. A
layer is gathered on all of them while the layer before is computed.

The weights are frozen, so nothing is ever scattered back: one all-gather of 4-bit bytes for forward, and one for backward. All
ranks must use the layers in the same order; `lockstep.py` sees to that where they compute different numbers of batches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed

from nybble.distributed.group import GROUP_TIMEOUT, own_of, ranks_that_share
from nybble.distributed.heartbeat import announce_wait
from nybble.errors import EngineError
from nybble.plan.ledger import STAGING_BUFFERS, aligned, share_bytes
from nybble.weights.copier import Mark, check_host_memory, pinned_buffers
from nybble.weights.frozen import FrozenWeight
from nybble.weights.moving import stay, stop_staying
from nybble.weights.packed import (
    StoredLayer,
    in_copy,
    mode_of,
    origin_of,
    packed_bytes,
    part_of,
    places,
    versions_of,
)


class ShardCopier:
    """Gathers the shares of all ranks; all of them must make one, and use it for the same layers in the same order.

    Args:
        device: of this rank.
        on_host: whether shares are in pinned memory of the host, and not on the device.
    """

    def __init__(self, device: torch.device, *, on_host: bool = False) -> None:
        self.device = device
        self.on_host = on_host
        self.group = _sharing_group(torch.distributed.group.WORLD)
        self.rank, self.ranks = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        self.where = f"spread over {self.ranks} ranks" + (", on their hosts" if on_host else "")
        self.unaffected = "saving the adapter works as it is"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(self, layers: Sequence[Sequence[torch.nn.Module]]) -> Iterator[StoredLayer]:
        """See `Copier.pack`; every rank must have the same weights.

        Raises:
            EngineError: any rank lacks the memory; then all of them raise it, and nothing was moved.
        """
        sizes = [share_bytes(packed_bytes(modules), self.ranks) for modules in layers]
        gathered = STAGING_BUFFERS * self.ranks * max(sizes, default=0)
        problem, buffers = "", []
        try:
            buffers = self._share_buffers(sizes)
            self.device_buffer(gathered)  # freed at once: what gathers layers will be allocated there
        except torch.OutOfMemoryError:
            problem = f"{(sum(sizes) * (not self.on_host) + gathered) / 1e9:.2f} GB do not fit on {self.device}"
        except EngineError as error:
            problem = error.what
        self._agree(problem)
        for modules, buffer in zip(layers, buffers, strict=True):
            yield ShardedLayer(modules, buffer, self)

    def device_buffer(self, size: int) -> torch.Tensor:
        """See `Copier.device_buffer`."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._stream is not None:
            buffer.record_stream(
                self._stream
            )  # once it is freed, its memory is not reused while it is still written to
        return buffer

    def mark(self) -> Mark:
        """See `Copier.mark`; without streams, what was computed before is done."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Mark) -> Mark:
        """See `Copier.copy`.

        Args:
            source: this rank's share.
            target: (shares of all ranks,) on the device.
            after: see `Copier.copy`.
        """
        own = target[self.rank * source.nbytes :][: source.nbytes]
        if self._stream is None:
            return torch.distributed.all_gather_into_tensor(target, source, group=self.group, async_op=True)
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            if self.on_host:
                source = own.copy_(source, non_blocking=True)
            torch.distributed.all_gather_into_tensor(target, source, group=self.group)
        return self._stream.record_event()

    def wait(self, copied: Mark, target: torch.Tensor) -> None:
        """See `Copier.wait`."""
        if self._stream is None:
            copied.wait()
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        target.record_stream(current)  # threads may have streams of their own

    def all_ranks(self, number: int) -> int:
        """See `Copier.all_ranks`."""
        announce_wait()
        total = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(total, group=self.group)
        return int(total)

    def _share_buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        if self.on_host:
            check_host_memory(sum(sizes))
            return list(pinned_buffers(sizes))
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]

    def _agree(self, problem: str) -> None:
        """Raise EngineError in all ranks where one of them has a problem: otherwise the others would wait for it."""
        problems = [""] * self.ranks
        torch.distributed.all_gather_object(problems, problem, group=self.group)
        for place, text in enumerate(problems):
            if text:
                rank = torch.distributed.get_global_rank(self.group, place)
                other = "engine.weights=sharded-host, which keeps the shares on the host"
                fix = "free host memory, or engine.weights=sharded" if self.on_host else f"more processes, or {other}"
                raise EngineError(
                    f"the share of the weights that rank {rank} should hold is too large for it: {text}", fix=fix
                )


@functools.lru_cache(maxsize=1)  # a communicator takes memory, and groups cannot be left alone
def _sharing_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """The group of the ranks that share weights with this one.

    It is a group of its own: what is gathered does not wait for the adapters' gradients, which are added up meanwhile.
    """
    groups = ranks_that_share()
    made = [torch.distributed.new_group(ranks, timeout=GROUP_TIMEOUT) for ranks in groups]  # all ranks make all of them
    group: torch.distributed.ProcessGroup = made[own_of(groups)]
    return group


class ShardedLayer:
    """Replaces the weights of linear layers by this rank's share of their bytes.

    The layers' own parameters and bitsandbytes' states become stand-ins with shape and type but without memory: a single value,
    not a number where the type has such, so that whatever computes with them by mistake is not a number either.

    Args:
        modules: the linear layers, in 4 or 16 bits; not PEFT's wrappers.
        buffer: (`share_bytes(packed_bytes(modules), ranks)`,) uint8 for the share.
        copier: gathers the shares.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], buffer: torch.Tensor, copier: ShardCopier) -> None:
        self.modules = tuple(modules)
        self.buffer = buffer
        self.nbytes = copier.ranks * buffer.nbytes
        self.origin = origin_of(modules)
        self.starts: dict[int, int] = {}
        self._copier = copier
        self.pack()

    def pack(self) -> None:
        """See `StoredLayer.pack`."""
        self._watched: list[torch.Tensor] = []
        self.starts.clear()
        whole = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.origin)
        start = 0
        for owner, name in places(self.modules):
            tensor = getattr(owner, name)
            with mode_of(owner, name):
                part_of(whole, start, tensor).copy_(tensor)
                stand_in = self._stand_in(name, tensor)
                setattr(owner, name, stand_in)
            if name in ("data", "absmax"):
                self._watched.append(owner if name == "data" else stand_in)
            self.starts[stand_in.data_ptr()] = start
            start += aligned(tensor.nbytes)
        self.buffer.copy_(whole.view(self._copier.ranks, -1)[self._copier.rank])
        for module in self.modules:
            stay(module)  # Accelerate moves the whole model to its device before training

    def move(self, device: torch.device) -> None:
        """See `StoredLayer.move`; all ranks must call it."""
        moved: list[torch.Tensor] = []
        whole: torch.Tensor | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            whole = self._copier.device_buffer(self.nbytes)
        self._refuse_missing_memory(whole is None)
        assert whole is not None, "otherwise it was refused"
        self._copier.wait(self._copier.copy(self.buffer, whole, self._copier.mark()), whole)
        with contextlib.suppress(torch.OutOfMemoryError):
            for owner, name in places(self.modules):
                stand_in = getattr(owner, name)
                with mode_of(owner, name):
                    moved.append(part_of(whole, self.starts[stand_in.data_ptr()], stand_in).to(device, copy=True))
        self._refuse_missing_memory(len(moved) < len(places(self.modules)))
        for (owner, name), tensor in zip(places(self.modules), moved, strict=True):
            with mode_of(owner, name):
                setattr(owner, name, tensor)
        for module in self.modules:
            stop_staying(module)

    def versions(self) -> tuple[int, ...]:
        """See `StoredLayer.versions`."""
        return versions_of(self._watched)

    def copied(self, weight: FrozenWeight, copy: torch.Tensor) -> FrozenWeight:
        """See `StoredLayer.copied`."""
        return in_copy(weight, self.starts, copy)

    def _refuse_missing_memory(self, missing: bool) -> None:
        """Raise torch.OutOfMemoryError in all ranks where one of them lacks memory: otherwise the others would wait for it."""
        if self._copier.all_ranks(int(missing)):
            raise torch.OutOfMemoryError("a rank lacks the memory for a whole layer")

    def _stand_in(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor is replaced by; the tables of values, of 1 kB at most, stay: saving a layer's description reads them."""
        if name in ("code", "offset"):
            return tensor.to(self._copier.device, copy=True)
        value: Any = float("nan") if tensor.is_floating_point() else 255
        return torch.full((1,), value, dtype=tensor.dtype, device=self._copier.device).expand(tensor.shape)
