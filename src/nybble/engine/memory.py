"""How many bytes a batch's activations may take, and how many layers' weights may stay dequantised; measured as it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.distributed.group import group_size
from nybble.engine.layer import Shared
from nybble.plan import ledger
from nybble.plan.free_memory import allocatable_bytes, host_memory
from nybble.plan.policies import KEEP_ALL, LAYER_INPUT, tile
from nybble.plan.shapes import LayerShape
from nybble.plan.solver import mix

SLACK = 0.05  # of the limit: what an allocator of blocks loses between them


@dataclass(frozen=True)
class Share:
    """What a batch may use."""

    policies: tuple[str, ...]
    """Of each layer."""
    cached_layers: int
    """Layers whose weights may stay dequantised."""


class Budget:
    """How the memory of one model's device is shared out."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.chunked_loss = False
        """Set by whoever computes the loss with `engine.loss`; otherwise memory is left for a whole batch's logits."""
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
        """The fastest mix for the memory that is free when a batch begins.

        Weights stay dequantised once every layer keeps everything and the optimiser has its state: both directions of a
        step go without dequantising them then, 11 ms of an H200's 450 for 4 x 2,048 tokens and 448 launches, which a small
        batch waits for. A batch that needs their memory takes it for good: to fill it again and again gains nothing.

        Args:
            shape: a layer's sizes.
            layers: how many there are.
            tokens: of the batch.
            trained: the parameters that will get gradients.
            shared: the device, and whether there was a backward.
            extra: bytes that a layer's backward needs for this batch beyond those of its shape.
        """
        numbers = sum(part.numel() for part in trained)
        pending = sum(ledger.GRADIENT * part.numel() for part in trained if part.grad is None)
        # Gradients were there and are gone: the optimiser has stepped, and its state exists.
        self._stepped = self._stepped or (shared.has_seen_backward and bool(pending))
        if not self._stepped:
            pending += ledger.MOMENTS * numbers  # AdamW's in float32 at most
        free = _free(shared.device, shared.workspace.cached_bytes) - pending
        for tiled_like in (KEEP_ALL, LAYER_INPUT):  # wide tiles where memory allows, narrow ones where it does not
            working = ledger.working_set_bytes(shape, tokens, tiled_like) + extra
            peak = max(working, self.loss_bytes(tokens))
            policies = mix(shape, layers, tokens, free - peak)
            if tile(policies[0], tokens) == tile(tiled_like, tokens):
                break
        needed = peak + tokens * sum(ledger.kept_bytes(policy, shape) for policy in policies)
        # Activations are gone when the optimiser steps; an AdamW of torch that is not fused then copies all that is trained.
        spare = free - max(needed, ledger.MOMENTS * numbers)
        return Share(policies, self._layers_cached(spare // ledger.dequantised_bytes(shape), policies))

    def _layers_cached(self, fitting: int, policies: Sequence[str]) -> int:
        """How many layers' weights stay dequantised, of so many that fit; never more than in a batch before."""
        if not self._stepped:
            return 0
        most = len(policies) if self._most_cached is None else self._most_cached
        self._most_cached = max(0, min(most, fitting)) if set(policies) == {KEEP_ALL} else 0
        return self._most_cached

    def loss_bytes(self, tokens: int) -> int:
        """Of the loss at its peak, the gradient of its input included."""
        return ledger.loss_bytes(tokens, self.vocabulary, self.hidden, chunked=self.chunked_loss)


def _free(device: torch.device, cached: int) -> int:
    """Bytes that a batch may use, those of the weights that stay dequantised now among them."""
    if device.type == "cuda":
        return allocatable_bytes(device, SLACK) + cached
    return (host_memory().free + cached) // 2 // group_size()
