"""The decoder's steps in plain torch, with a tensor for each sequence's keys and values: for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.generate.decoder.layers import PlainLayers, attend_to, tokens_of
from nybble.generate.decoder.model import DecoderModel
from nybble.generate.decoder.plain_step import PlainStep
from nybble.generate.decoder.steps import CacheSlot, Visit

ROWS = 16  # of a step on two cores, where SmolLM2's tokens/s grow little beyond
CHUNK = 256  # tokens of a prompt between two steps
KEPT = 16  # finished sequences whose beginnings others may share


@dataclass(eq=False)
class PlainSlot:
    """See `CacheSlot`."""

    states: torch.Tensor
    """(layers, 2, kv heads, tokens, head size): keys and values"""
    adapter: str | None
    length: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return int(self.states.shape[3])


class PlainSteps:
    """See `Steps`.

    Args:
        model: on a CPU, or any device without kernels for it.
        tokens: that all sequences together may have in the cache.
    """

    about = "plain torch"
    asynchronous = False

    def __init__(self, model: DecoderModel, tokens: int) -> None:
        self.model, self.tokens, self.rows, self.chunk = model, tokens, ROWS, CHUNK
        self.layers = PlainLayers(model)
        self._step: PlainStep | None = None
        self._used = 0
        self._finished: list[tuple[Sequence[int], PlainSlot]] = []

    def warm_up(self) -> None:
        """See `Steps.warm_up`; there is nothing to prepare."""

    def reserve(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> PlainSlot | None:
        """See `Steps.reserve`."""
        model = self.model
        prefix, shared = self._best_prefix(prompt, adapter)
        while self._used + tokens > self.tokens and self._finished:
            self._used -= self._finished.pop(0)[1].capacity
        if self._used + tokens > self.tokens:
            return None
        shape = (len(model.layers), 2, model.kv_heads, tokens, model.head_size)
        slot = PlainSlot(torch.empty(shape, dtype=self.layers.dtype, device=model.device), adapter)
        self._used += tokens
        if prefix is not None:
            slot.states[:, :, :, :shared] = prefix.states[:, :, :, :shared]
            slot.length = shared
        return slot

    def prefill(
        self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]], visit: Visit | None = None
    ) -> torch.Tensor:
        """See `Steps.prefill`."""
        residual = self._compute(slots, parts)
        if visit is not None:
            visit(residual, self.layers.logits)
        logits = self.layers.logits(residual[self._tensor([len(part) for part in parts]).cumsum(0) - 1])
        for slot, part in zip(slots, parts, strict=True):
            slot.length += len(part)
        return logits

    def verify(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Steps.verify`."""
        return self.layers.logits(self._compute(slots, parts))

    def _compute(self, slots: Sequence[CacheSlot], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Store keys and values of tokens behind what is in the slots; the residual stream after all layers."""
        spans = [(slot.length, slot.length + len(part)) for slot, part in zip(slots, parts, strict=True)]
        lengths = [len(part) for part in parts]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            outs = []
            split = (each.split(lengths) for each in (q, k, v))
            for slot, (start, end), own_q, own_k, own_v in zip(slots, spans, *split, strict=True):
                assert isinstance(slot, PlainSlot)
                keys, values = slot.states[layer]
                keys[:, start:end], values[:, start:end] = own_k.transpose(0, 1), own_v.transpose(0, 1)
                outs.append(attend_to(own_q, keys[:, :end], values[:, :end]))
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        one = slice(*spans[0])
        where = one if len(spans) == 1 else self._tensor([place for span in spans for place in range(*span)])
        adapters = tokens_of(
            [slot.adapter for slot, count in zip(slots, lengths, strict=True) for _ in range(count)], self.model.device
        )
        ids = self._tensor([token for part in parts for token in part])
        return self.layers.run(ids, self.layers.rotary(where), adapters, attend)

    def decode(self, slots: Sequence[CacheSlot], ids: torch.Tensor) -> torch.Tensor:
        """See `Steps.decode`."""
        if self._step is None or self._step.rows != len(slots):
            self._step = PlainStep(self.layers, len(slots))
        states = [slot.states for slot in slots if isinstance(slot, PlainSlot)]
        adapters = tokens_of([slot.adapter for slot in slots], self.model.device)
        with torch.inference_mode():
            logits = self._step.run(ids, states, [slot.length for slot in slots], adapters)
        for slot in slots:
            slot.length += 1
        return logits

    def release(self, slot: CacheSlot, ids: Sequence[int]) -> None:
        """See `Steps.release`."""
        assert isinstance(slot, PlainSlot)
        self._finished.append((ids, slot))
        if len(self._finished) > KEPT:
            self._used -= self._finished.pop(0)[1].capacity

    def _best_prefix(self, prompt: Sequence[int], adapter: str | None) -> tuple[PlainSlot | None, int]:
        """The finished sequence that begins most like a prompt, and how many tokens of it."""
        best: tuple[PlainSlot | None, int] = (None, 0)
        for ids, slot in self._finished:
            shared = _common(ids, prompt) if slot.adapter == adapter else 0
            if shared > best[1]:
                best = slot, shared
        return best

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.model.device)


def _common(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens that both begin with, the prompt's last left out: its logits are wanted."""
    limit = min(len(ids), len(prompt) - 1)
    return next((n for n in range(limit) if ids[n] != prompt[n]), limit)
