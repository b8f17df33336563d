"""One pass over parts of several prompts on a CUDA device: where their tokens are in the paged cache, and their attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from nybble.generate.decoder.pages import PAGE
from nybble.generate.decoder.step_graphs import PagedSlot
from nybble.generate.transfers import to_device

aten = torch.ops.aten


class PromptPass:
    """The parts of some prompts, one after another.

    Args:
        slots: of the sequences.
        parts: the tokens to append to each.
        cache: (layers, 2, pages, kv heads, 64, head size).
    """

    def __init__(self, slots: Sequence[PagedSlot], parts: Sequence[Sequence[int]], cache: torch.Tensor) -> None:
        self._cache = cache
        device = cache.device
        lengths = [len(part) for part in parts]
        ends = [slot.length + length for slot, length in zip(slots, lengths, strict=True)]
        places = [range(slot.length, end) for slot, end in zip(slots, ends, strict=True)]
        count = sum(lengths)
        columns = [
            [token for part in parts for token in part],
            [place for own in places for place in own],
            _pages(slots, places),
            _offsets(places),
        ]
        self.ids, self.positions, self._pages, self._offsets = to_device(list(itertools.chain(*columns)), device).split(
            count
        )
        self._queries = _bounds(lengths, device), max(lengths)
        self._keys = _bounds(ends, device), max(ends)
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None
        if any(slot.length for slot in slots):
            whole = [range(end) for end in ends]
            pages, offsets = to_device([*_pages(slots, whole), *_offsets(whole)], device).split(sum(ends))
            self._all = pages, offsets
        self.last = to_device(lengths, device).cumsum(0) - 1
        """(sequences,) the last token of each"""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store keys and values, and attend; see `layers.Attend`."""
        k, v = self._append(layer, 0, k), self._append(layer, 1, v)
        bounds, longest = zip(self._queries, self._keys, strict=True)
        out: torch.Tensor = aten._flash_attention_forward(q, k, v, *bounds, *longest, 0.0, True, False)[0]
        return out

    def _append(self, layer: int, which: int, states: torch.Tensor) -> torch.Tensor:
        """Store keys or values; those of all positions of the sequences, as the cache holds them."""
        cache, dtype = self._cache[layer, which], states.dtype
        if cache.dtype == torch.float8_e4m3fn:
            largest = torch.finfo(cache.dtype).max  # beyond it torch would write NaN
            states = states.clamp(-largest, largest).to(cache.dtype)
            bits = cache.view(torch.uint8)  # indexing knows no float8
            bits[self._pages, :, self._offsets] = states.view(torch.uint8)
        else:
            bits = cache
            cache[self._pages, :, self._offsets] = states
        if self._all is not None:
            pages, offsets = self._all
            states = bits[pages, :, offsets].view(cache.dtype)
        return states.to(dtype)


def _pages(slots: Sequence[PagedSlot], places: Sequence[range]) -> list[int]:
    return [slot.pages[place // PAGE] for slot, own in zip(slots, places, strict=True) for place in own]


def _offsets(places: Sequence[range]) -> list[int]:
    return [place % PAGE for own in places for place in own]


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where each sequence begins, and where the last one ends, int32."""
    return to_device([0, *itertools.accumulate(lengths)], device, torch.int32)
