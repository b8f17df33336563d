"""The decoder's steps on a CUDA device: kernels in a graph for each number of rows, a paged cache, prompts in plain torch."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from nybble.generate.decoder.cuda_step import pack_model
from nybble.generate.decoder.layers import PlainLayers, attend_to, tokens_of
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.pages import PAGE, PagePool
from nybble.generate.decoder.step_graphs import SIZES, PagedSlot, StepGraphs
from nybble.generate.decoder.steps import CacheSlot
from nybble.generate.sampling import to_device
from nybble.kernels.cuda.compile import CompileError
from nybble.kernels.cuda.kernels import Kernels
from nybble.weights.watched import Ineligible

CHUNK = 1024  # tokens of a prompt between two steps: about 40 ms of a 7B on an H100


class CudaSteps:
    """See `Steps`.

    Args:
        model: on a CUDA device.
        tokens: that the cache is made for.
        folder: where compiled kernels are kept.

    Raises:
        Ineligible: something the kernels do not take, or they do not compile.
    """

    about = "CUDA kernels, a graph for each number of rows"
    asynchronous = True

    def __init__(self, model: DecoderModel, tokens: int, folder: pathlib.Path | None) -> None:
        self.model = model
        packed = pack_model(model)
        self._layers = PlainLayers(model)
        self._pool = PagePool(max(1, tokens // PAGE))
        self.rows, self.chunk, self.tokens = SIZES[-1], CHUNK, self._pool.count * PAGE
        shape = (len(model.layers), 2, self._pool.count, model.kv_heads, PAGE, model.head_size)
        self._cache = torch.zeros(shape, dtype=torch.bfloat16, device=model.device)
        self._most_pages = min(self._pool.count, -(-model.positions // PAGE))
        try:
            self._graphs = StepGraphs(packed, Kernels(model.device, folder), self._cache, self._most_pages)
            self._graphs.prepare(SIZES[0])
        except CompileError as error:
            raise Ineligible(str(error)) from error

    def reserve(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> PagedSlot | None:
        """See `Steps.reserve`."""
        found = self._pool.reserve(prompt, adapter, -(-tokens // PAGE))
        if found is None:
            return None
        pages, shared = found
        on_device = to_device([*pages, *[0] * (self._most_pages - len(pages))], self.model.device)
        return PagedSlot(pages, on_device, adapter, shared * PAGE)

    def prefill(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Steps.prefill`."""
        own = _paged(slots)
        spans = [(slot.length, slot.length + len(part)) for slot, part in zip(own, parts, strict=True)]
        lengths = [len(part) for part in parts]
        positions = to_device([place for span in spans for place in range(*span)], self.model.device)
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
        ids = to_device([token for part in parts for token in part], self.model.device)
        residual = self._layers.run(ids, self._layers.rotary(positions), adapters, attend)
        for slot, (_, end) in zip(own, spans, strict=True):
            slot.length = end
        return self._layers.logits(residual[to_device(lengths, self.model.device).cumsum(0) - 1])

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

    def decode(self, slots: Sequence[CacheSlot], ids: torch.Tensor) -> torch.Tensor:
        """See `Steps.decode`."""
        logits = self._graphs.run(_paged(slots), ids)
        for slot in slots:
            slot.length += 1
        return logits

    def release(self, slot: CacheSlot, ids: Sequence[int]) -> None:
        """See `Steps.release`."""
        assert isinstance(slot, PagedSlot)
        self._pool.release(slot.pages, ids, slot.adapter)


def _paged(slots: Sequence[CacheSlot]) -> list[PagedSlot]:
    return [slot for slot in slots if isinstance(slot, PagedSlot)]
