"""How many bytes a batch's activations may take, and how many layers' weights may stay dequantised; measured when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.distributed.group import group_size
from nybble.engine.layer import Shared
from nybble.plan import ledger
from nybble.plan.free_memory import allocatable_bytes, host_memory
from nybble.plan.policies import KEEP_ALL
from nybble.plan.shapes import LayerShape
from nybble.plan.solver import SLACK, divide


@dataclass(frozen=True)
class Share:
    """The memory that a batch may use."""

    policies: tuple[str, ...]
    """The policy of each layer."""
    cached_layers: int
    """Layers whose weights may stay dequantised."""


class Budget:
    """How the memory of a model's device is divided."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.chunked_loss = False
        """Set by the caller that computes the loss with `engine.loss`; otherwise memory is left for all logits of a batch."""
        self._stepped = False
        self._most_cached: int | None = None

    def share(
        self,
        shape: LayerShape,
        layers: int,
        tokens: int,
        trained: Sequence[torch.nn.Parameter],
        shared: Shared,
        extra: int = 0,
    ) -> Share:
        """The fastest mix of policies for the memory that is free when a batch starts.

        Weights stay dequantised once every layer keeps everything and the optimiser has its state. Forward and backward then
        need not dequantise them, which saves 11 of 450 ms on an H200 for 4 x 2,048 tokens, and 448 launches, which a small
        batch waits for. A batch that needs this memory takes it for good: filling it again and again gains nothing.

        Args:
            shape: the sizes of a layer.
            layers: number of layers.
            tokens: number of tokens in the batch.
            trained: the parameters that will get gradients.
            shared: the device, and whether there was a backward.
            extra: bytes that a layer's backward needs for this batch beyond what its shape implies.
        """
        numbers = sum(part.numel() for part in trained)
        pending = sum(ledger.GRADIENT * part.numel() for part in trained if part.grad is None)
        # There were gradients and now there are none: the optimiser has stepped, and its state exists.
        self._stepped = self._stepped or (shared.has_seen_backward and bool(pending))
        if not self._stepped:
            pending += ledger.MOMENTS * numbers  # at most AdamW's moments in float32
        free = _free(shared.device, shared.workspace.cached_bytes) - pending
        policies, needed = divide(shape, layers, tokens, free, self.loss_bytes(tokens), extra)
        # Activations are freed before the optimiser steps; torch's AdamW, if it is not fused, then copies everything trained.
        spare = free - max(needed, ledger.MOMENTS * numbers)
        return Share(policies, self._layers_cached(spare // ledger.dequantised_bytes(shape), policies))

    def fits_without_gradients(self, shape: LayerShape, tokens: int, device: torch.device) -> bool:
        """Whether a batch without gradients fits into the memory that is free now: one layer at a time, and the loss.

        Args:
            shape: the sizes of a layer.
            tokens: number of tokens in the batch.
            device: where it is computed.
        """
        free = _free(device, 0)
        policies, needed = divide(shape, 1, tokens, free, self.loss_bytes(tokens))
        return policies == (KEEP_ALL,) and needed <= free

    def _layers_cached(self, fitting: int, policies: Sequence[str]) -> int:
        """How many layers' weights stay dequantised, of the number that fit; never more than in an earlier batch."""
        if not self._stepped:
            return 0
        most = len(policies) if self._most_cached is None else self._most_cached
        self._most_cached = max(0, min(most, fitting)) if set(policies) == {KEEP_ALL} else 0
        return self._most_cached

    def loss_bytes(self, tokens: int) -> int:
        """Bytes of the loss at its peak, the gradient of its input included."""
        return ledger.loss_bytes(tokens, self.vocabulary, self.hidden, chunked=self.chunked_loss)


def _free(device: torch.device, cached: int) -> int:
    """Bytes that a batch may use, including those of the weights that stay dequantised now.

    Buffers for streamed weights are allocated when a model is fused, so they are not among them (`ledger.streamed_bytes`).
    """
    if device.type == "cuda":
        return allocatable_bytes(device, SLACK) + cached
    return (host_memory().free + cached) // 2 // group_size()
