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

    about = "CUDA kernels, a graph for each number of rows"

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

    def prefill(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Steps.prefill`."""
        own = [slot for slot in slots if isinstance(slot, PagedSlot)]
        spans = [(slot.length, slot.length + len(part)) for slot, part in zip(own, parts, strict=True)]
        lengths = [len(part) for part in parts]
        positions = self._tensor([place for span in spans for place in range(*span)])
        pages = torch.cat([
            slot.on_device[start // PAGE : (end - 1) // PAGE + 1].repeat_interleave(PAGE)[start % PAGE :][: end - start]
            for slot, (start, end) in zip(own, spans, strict=True)
        ])  # fmt: skip
        offsets = positions % PAGE

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache[layer]
            keys[pages, :, offsets], values[pages, :, offsets] = k, v
            split = (each.split(lengths) for each in (q, k, v))
            outs = [
                self._attend(layer, slot, span, *states) for slot, span, *states in zip(own, spans, *split, strict=True)
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        adapters = tokens_of([slot.adapter for slot, count in zip(own, lengths, strict=True) for _ in range(count)])
        ids = self._tensor([token for part in parts for token in part])
        residual = self._layers.run(ids, self._layers.rotary(positions), adapters, attend)
        for slot, (_, end) in zip(own, spans, strict=True):
            slot.length = end
        return self._layers.logits(residual[self._tensor(lengths).cumsum(0) - 1])

    def _attend(
        self, layer: int, slot: PagedSlot, span: tuple[int, int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """One sequence's: to its own tokens alone where it begins here, else to its pages."""
        start, end = span
        if start == 0:
            return attend_to(q, k.transpose(0, 1), v.transpose(0, 1))
        held = slot.on_device[: -(-end // PAGE)]
        whole = (states[held].transpose(0, 1).flatten(1, 2)[:, :end] for states in self._cache[layer])
        return attend_to(q, *whole)

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.model.device)

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
