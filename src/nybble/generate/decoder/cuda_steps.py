"""The decoder's steps on a CUDA device: kernels in a graph for each number of rows, a paged cache, prompts in plain torch."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.generate.decoder.cuda_step import CudaStep, StepInput, pack_model
from nybble.generate.decoder.layers import PlainLayers, attend_to, tokens_of
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.pages import PAGE, PagePool
from nybble.generate.decoder.steps import CacheSlot
from nybble.kernels.cuda.kernels import Kernels

log = logging.getLogger("nybble.generate")
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows of a graph; missing rows stand idle
CHUNK = 1024  # tokens of a prompt between two steps: about 40 ms of a 7B on an H100


@dataclass(eq=False)
class PagedSlot:
    """See `CacheSlot`."""

    pages: list[int]
    on_device: torch.Tensor
    """(pages,) int64"""
    adapter: str | None
    length: int


class CudaSteps:
    """See `Steps`.

    Args:
        model: on a CUDA device.
        tokens: that the cache is made for.
        folder: where compiled kernels are kept.

    Raises:
        Ineligible: something the kernels do not take.
    """

    def __init__(self, model: DecoderModel, tokens: int, folder: pathlib.Path | None) -> None:
        self.model = model
        self._packed = pack_model(model)
        self._kernels = Kernels(model.device, folder)
        self._layers = PlainLayers(model)
        self._pool = PagePool(max(1, tokens // PAGE))
        self.rows, self.chunk, self.tokens = SIZES[-1], CHUNK, self._pool.count * PAGE
        shape = (len(model.layers), 2, self._pool.count, model.kv_heads, PAGE, model.head_size)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16, device=model.device)
        self._rotary = model.rotary_tables(model.positions)
        self._most_pages = min(self._pool.count, -(-model.positions // PAGE))
        self._graphs: dict[int, StepGraph] = {}

    def reserve(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> PagedSlot | None:
        """See `Steps.reserve`."""
        found = self._pool.reserve(prompt, adapter, -(-tokens // PAGE))
        if found is None:
            return None
        pages, shared = found
        return PagedSlot(pages, torch.tensor(pages, device=self.model.device), adapter, shared * PAGE)

    def prefill(self, slot: CacheSlot, ids: Sequence[int]) -> torch.Tensor:
        """See `Steps.prefill`."""
        assert isinstance(slot, PagedSlot)
        start, end = slot.length, slot.length + len(ids)
        positions = torch.arange(start, end, device=self.model.device)
        pages, offsets = slot.on_device[positions // PAGE], positions % PAGE
        held = slot.on_device[: -(-end // PAGE)]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache[layer]
            keys[pages, :, offsets], values[pages, :, offsets] = k, v
            if start == 0:
                return attend_to(q, k.transpose(0, 1), v.transpose(0, 1))
            whole = (states[held].transpose(0, 1).flatten(1, 2)[:, :end] for states in (keys, values))
            return attend_to(q, *whole)

        rotary = self._rotary[0][start:end].unsqueeze(1), self._rotary[1][start:end].unsqueeze(1)
        residual = self._layers.run(
            torch.tensor(ids, device=self.model.device), rotary, tokens_of([slot.adapter]), attend
        )
        slot.length = end
        return self._layers.logits(residual[-1:])[0]

    def decode(self, slots: Sequence[CacheSlot], ids: Sequence[int]) -> torch.Tensor:
        """See `Steps.decode`."""
        size = next(size for size in SIZES if size >= len(slots))
        if size not in self._graphs:
            self._graphs[size] = self._make_graph(size)
        logits = self._graphs[size].run(slots, ids)
        for slot in slots:
            slot.length += 1
        return logits

    def release(self, slot: CacheSlot, ids: Sequence[int]) -> None:
        """See `Steps.release`."""
        assert isinstance(slot, PagedSlot)
        self._pool.release(slot.pages, ids, slot.adapter)

    def _make_graph(self, size: int) -> StepGraph:
        graph = StepGraph(size, self._most_pages, self.model)
        graph.capture(CudaStep(self._packed, self._kernels, graph.inputs, self._cache, self._rotary))
        return graph


class StepGraph:
    """A step of a fixed number of rows, captured once.

    Args:
        size: rows.
        most_pages: of a row.
        model: which computes.
    """

    def __init__(self, size: int, most_pages: int, model: DecoderModel) -> None:
        self.size, self._adapters = size, {name: index for index, name in enumerate(model.adapters)}
        # Everything a step is told stands in one buffer, so that one copy brings it to the device.
        self._host = torch.zeros((3 + most_pages) * size, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros_like(self._host, device=model.device)
        tokens, positions, adapters, pages = self._device.split([size, size, size, most_pages * size])
        self.inputs = StepInput(tokens, positions, pages.view(size, most_pages), adapters)
        parts = self._host.split([size, size, size, most_pages * size])
        self._tokens, self._positions, self._rows_adapters = parts[:3]
        self._pages = parts[3].view(size, most_pages)
        self._known: list[CacheSlot] = []
        self._positions.fill_(-1)
        self._device.copy_(self._host)
        self._step: CudaStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, step: CudaStep) -> None:
        """Capture a step; one that cannot be captured is launched kernel by kernel, which the log says."""
        self._step = step
        step.run()  # compiles, and allocates what stays
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step.run()
        except RuntimeError as error:
            log.warning(
                "the step of %d rows cannot be captured in a CUDA graph and will be slower: %s", self.size, error
            )
        else:
            self._graph = graph

    def run(self, slots: Sequence[CacheSlot], ids: Sequence[int]) -> torch.Tensor:
        """Logits of the rows, (rows, vocabulary) float32, good until the next call."""
        rows = len(slots)
        if list(slots) != self._known:
            self._positions.fill_(-1)
            self._rows_adapters.fill_(-1)
            for row, slot in enumerate(slots):
                assert isinstance(slot, PagedSlot)
                self._pages[row, : len(slot.pages)] = torch.tensor(slot.pages, dtype=torch.int32)
                if slot.adapter is not None:
                    self._rows_adapters[row] = self._adapters[slot.adapter]
            self._known = list(slots)
        self._tokens[:rows] = torch.tensor(ids, dtype=torch.int32)
        self._positions[:rows] = torch.tensor([slot.length for slot in slots], dtype=torch.int32)
        self._device.copy_(self._host, non_blocking=True)
        assert self._step is not None
        if self._graph is None:
            self._step.run()
        else:
            self._graph.replay()
        return self._step.logits[:rows]
