"""The decoder's steps on a CUDA device: kernels in a graph for each number of rows, a paged cache, prompts in plain torch."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence

import torch

from nybble.generate.decoder.cuda_step import pack_model
from nybble.generate.decoder.layers import PlainLayers, tokens_of
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.pages import PAGE, PagePool, pages_of
from nybble.generate.decoder.prompt_pass import PromptPass
from nybble.generate.decoder.step_graphs import SIZES, PagedSlot, StepGraphs, StepRow
from nybble.generate.decoder.steps import CacheSlot, Visit
from nybble.generate.transfers import to_device
from nybble.kernels.cuda.compile import CompileError
from nybble.kernels.cuda.kernels import Kernels
from nybble.weights.watched import Ineligible

CHUNK = 1024  # tokens of a prompt between two steps: 35 ms of a 7B on an H100
# So many tokens of prompts go through the steps' kernels, 64 at a time, whose products take 6 ms of a 7B on an H100. A pass in
# plain torch takes the host 25 ms however short it is.
SHORT = 192
WARM_UP_LENGTHS = (
    16,
    21,
    CHUNK,
)  # Triton compiles anew for a number of tokens that is a multiple of 16, and for one that is not


class CudaSteps:
    """See `Steps`.

    Args:
        model: on a CUDA device.
        tokens: that the cache is made for.
        folder: where compiled kernels are kept.
        dtype: of keys and values: bfloat16 or float8_e4m3fn.

    Raises:
        Ineligible: something the kernels do not take, or they do not compile.
    """

    about = "CUDA kernels, a graph for each number of rows"
    asynchronous = True

    def __init__(
        self, model: DecoderModel, tokens: int, folder: pathlib.Path | None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.model = model
        packed = pack_model(model)
        self._layers = PlainLayers(model, [
            {name: group.named for name, group in layer.items()} for layer in packed.layers
        ])  # fmt: skip
        self._pool = PagePool(pages_of(tokens))
        self.rows, self.chunk, self.tokens = SIZES[-1], CHUNK, self._pool.count * PAGE
        shape = (len(model.layers), 2, self._pool.count, model.kv_heads, PAGE, model.head_size)
        self._cache = torch.zeros(shape, dtype=dtype, device=model.device)
        self._most_pages = min(self._pool.count, pages_of(model.positions))
        try:
            self._graphs = StepGraphs(packed, Kernels(model.device, folder), self._cache, self._most_pages)
            self._graphs.prepare(SIZES[0])
        except CompileError as error:
            raise Ineligible(str(error)) from error

    def warm_up(self) -> None:
        """See `Steps.warm_up`: kernels are compiled, steps captured, and prompts of a few lengths computed."""
        for size in SIZES:
            self._graphs.prepare(size)
            self._graphs.prepare(size, together=True)
        for length in WARM_UP_LENGTHS:
            slot = self.reserve([0] * length, None, length)
            if slot is not None:
                self.prefill([slot], [[0] * length])
                self.release(slot, [])

    def reserve(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> PagedSlot | None:
        """See `Steps.reserve`."""
        found = self._pool.reserve(prompt, adapter, pages_of(tokens))
        if found is None:
            return None
        pages, shared = found
        on_device = to_device([*pages, *[0] * (self._most_pages - len(pages))], self.model.device)
        return PagedSlot(pages, on_device, adapter, shared * PAGE)

    def prefill(
        self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]], visit: Visit | None = None
    ) -> torch.Tensor:
        """See `Steps.prefill`."""
        if visit is None and sum(map(len, parts)) <= SHORT:
            return self._prefill_by_steps(slots, parts)
        prompts = PromptPass(_paged(slots), parts, self._cache)
        names = [slot.adapter for slot, part in zip(slots, parts, strict=True) for _ in part]
        adapters = tokens_of(names, self.model.device)
        residual = self._layers.run(prompts.ids, self._layers.rotary(prompts.positions), adapters, prompts.attend)
        if visit is not None:
            visit(residual, self._layers.logits)
        logits = self._layers.logits(residual[prompts.last])
        for slot, part in zip(slots, parts, strict=True):
            slot.length += len(part)
        return logits

    def _prefill_by_steps(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        rows, ends = _rows(slots, parts), list(itertools.accumulate(map(len, parts)))
        logits = []
        for first in range(0, len(rows), SIZES[-1]):
            step = self._graphs.run_together(rows[first : first + SIZES[-1]])
            last = [end - 1 - first for end in ends if first < end <= first + len(step)]
            logits.append(step[to_device(last, self.model.device)])
        for slot, part in zip(slots, parts, strict=True):
            slot.length += len(part)
        return torch.cat(logits)

    def decode(self, slots: Sequence[CacheSlot], ids: torch.Tensor) -> torch.Tensor:
        """See `Steps.decode`."""
        logits = self._graphs.run(_paged(slots), ids)
        for slot in slots:
            slot.length += 1
        return logits

    def verify(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Steps.verify`."""
        return self._graphs.run_together(_rows(slots, parts))

    def release(self, slot: CacheSlot, ids: Sequence[int]) -> None:
        """See `Steps.release`."""
        assert isinstance(slot, PagedSlot)
        self._pool.release(slot.pages, ids, slot.adapter)


def _paged(slots: Sequence[CacheSlot]) -> list[PagedSlot]:
    return [slot for slot in slots if isinstance(slot, PagedSlot)]


def _rows(slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> list[StepRow]:
    """Tokens behind what is in their slots."""
    return [
        StepRow(slot, slot.length + n, token)
        for slot, part in zip(_paged(slots), parts, strict=True)
        for n, token in enumerate(part)
    ]
