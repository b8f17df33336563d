"""Steps of a fixed number of rows, each captured in a CUDA graph once; all read their input from the same buffers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nybble.generate.decoder.cuda_step import CudaStep, PackedModel, StepInput
from nybble.generate.transfers import to_device
from nybble.kernels.cuda.buffers import SharedBuffers
from nybble.kernels.cuda.kernels import Kernels

log = logging.getLogger("nybble.generate")
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows of a graph; missing rows stand idle


@dataclass(eq=False)
class PagedSlot:
    """See `CacheSlot`."""

    pages: list[int]
    on_device: torch.Tensor
    """(most pages of a row,) int64; zeros behind its pages"""
    adapter: str | None
    length: int


class StepRow(NamedTuple):
    """One token of a step."""

    slot: PagedSlot
    position: int
    token: int


@dataclass(frozen=True)
class CapturedStep:
    """One number of rows."""

    step: CudaStep
    graph: torch.cuda.CUDAGraph | None
    """None where the step could not be captured."""


class StepGraphs:
    """The steps of all sizes.

    Args:
        packed: the model.
        kernels: of its device.
        cache: as in `CudaStep`.
        most_pages: of a row.
    """

    def __init__(self, packed: PackedModel, kernels: Kernels, cache: torch.Tensor, most_pages: int) -> None:
        model, rows = packed.model, SIZES[-1]
        self._packed, self._kernels, self._cache = packed, kernels, cache
        self._rotary = model.rotary_tables(model.positions)
        self._adapters = {name: index for index, name in enumerate(model.adapters)}
        self._tokens = torch.zeros(rows, dtype=torch.long, device=model.device)
        # Positions, adapters, and how far a step advances: 1, or 0 for an idle row.
        self._facts = torch.zeros(3, rows, dtype=torch.int32, device=model.device)
        self._pages = torch.zeros(rows, most_pages, dtype=torch.int32, device=model.device)
        self._known: list[PagedSlot] = []
        self._lengths: list[int] = []
        """Tokens of each known slot, as the device has them."""
        self._captured: dict[tuple[int, bool], CapturedStep] = {}
        self._buffers = SharedBuffers(model.device)
        self._step(rows, together=False)  # takes the largest buffers
        self._graph_memory = torch.cuda.graph_pool_handle()  # nothing in it outlives a replay

    def prepare(self, size: int, *, together: bool = False) -> CapturedStep:
        """Capture the step of so many rows, unless it is; one that cannot be captured will be launched kernel by kernel.

        Args:
            size: one of `SIZES`.
            together: rows may be tokens of one sequence.
        """
        captured = self._captured.get((size, together))
        if captured is None:
            self._known = []
            self._facts[0], self._facts[2] = -1, 0  # nothing in the cache is touched meanwhile
            step = self._step(size, together=together)
            self._launch(step)  # compiles, and allocates what stays
            captured = self._captured[size, together] = CapturedStep(step, self._capture(step))
        return captured

    def run(self, slots: Sequence[PagedSlot], ids: torch.Tensor) -> torch.Tensor:
        """A token for each row: logits, (rows, vocabulary) float32, valid until the next call."""
        lengths = [slot.length for slot in slots]
        captured = self.prepare(_size(len(slots)))
        if slots != self._known or lengths != self._lengths:
            self._upload(slots, lengths, captured)
        logits = self._compute(captured, ids)
        self._known, self._lengths = list(slots), [length + 1 for length in lengths]
        return logits

    def run_together(self, rows: Sequence[StepRow]) -> torch.Tensor:
        """Tokens of which several may be of one sequence: logits after each, (rows, vocabulary), valid until the next call."""
        captured = self.prepare(_size(len(rows)), together=True)
        self._upload([row.slot for row in rows], [row.position for row in rows], captured)
        self._known = []
        return self._compute(captured, to_device([row.token for row in rows], self._tokens.device))

    def _compute(self, captured: CapturedStep, ids: torch.Tensor) -> torch.Tensor:
        self._tokens[: len(ids)].copy_(ids)
        if captured.graph is None:
            self._launch(captured.step)
        else:
            captured.graph.replay()
        return captured.step.logits[: len(ids)]

    def _step(self, size: int, *, together: bool) -> CudaStep:
        inputs = StepInput(self._tokens[:size], self._facts[0, :size], self._pages[:size], self._facts[1, :size])
        return CudaStep(
            self._packed, self._kernels, inputs, self._cache, self._rotary, self._buffers, together=together
        )

    def _launch(self, step: CudaStep) -> None:
        step.run()
        step.inputs.positions.add_(self._facts[2, : len(step.inputs.tokens)])

    def _capture(self, step: CudaStep) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._graph_memory):
                self._launch(step)
        except RuntimeError as error:
            rows = len(step.inputs.tokens)
            log.warning("the step of %d rows cannot be captured in a CUDA graph and will be slower: %s", rows, error)
            return None
        return graph

    def _upload(self, slots: Sequence[PagedSlot], positions: Sequence[int], captured: CapturedStep) -> None:
        size = len(captured.step.inputs.tokens)
        idle = size - len(slots)
        adapters = [-1 if slot.adapter is None else self._adapters[slot.adapter] for slot in slots]
        columns = [*positions, *[-1] * idle, *adapters, *[-1] * idle, *[1] * len(slots), *[0] * idle]
        self._facts[:, :size].copy_(to_device(columns, self._facts.device).view(3, size))
        self._pages[: len(slots)].copy_(torch.stack([slot.on_device for slot in slots]))


def _size(rows: int) -> int:
    return next(size for size in SIZES if size >= rows)
