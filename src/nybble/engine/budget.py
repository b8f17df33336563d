"""How many bytes the activations of a batch may take, measured where the batch begins."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from nybble.engine.loss import CHUNK
from nybble.plan.activations import KEEP_ALL, LAYER_INPUT, LayerShape, mix, passing_bytes, tile

SLACK = 0.05  # of the limit: what an allocator of blocks loses between them
UNSEEN_STATE = 8  # bytes a trained parameter before the first optimiser step: AdamW's two moments in float32


class Budget:
    """The memory of one device, for one model."""

    def __init__(self, device: torch.device, vocabulary: int, hidden: int) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self.hidden = hidden
        self.chunked_loss = False
        """Set by whoever computes the loss with `engine.loss`; else room is left for a whole batch's logits."""
        self._had_gradients = False

    def policies(
        self, shape: LayerShape, layers: int, tokens: int, trained: Sequence[torch.nn.Parameter]
    ) -> tuple[str, ...]:
        """The fastest mix for the memory that is free when a batch begins.

        Args:
            shape: a layer's sizes.
            layers: how many there are.
            tokens: of the batch.
            trained: the parameters that will get gradients.
        """
        coming = sum(4 * part.numel() for part in trained if part.grad is None)
        stepped = self._had_gradients and bool(coming)  # gradients were there and are gone: an optimiser has its state
        self._had_gradients = True
        if not stepped:
            coming += UNSEEN_STATE * sum(part.numel() for part in trained)
        free = self._free() - coming
        for tiled_like in (KEEP_ALL, LAYER_INPUT):  # wide tiles where memory allows, narrow ones where it does not
            passing = max(passing_bytes(shape, tokens, tiled_like), self.loss_bytes(tokens))
            found = mix(shape, layers, tokens, free - passing)
            if tile(found[0]) == tile(tiled_like):
                break
        return found

    def loss_bytes(self, tokens: int) -> int:
        """Of the loss at its peak, the gradient of its input included."""
        if self.chunked_loss:
            return min(CHUNK, tokens) * self.vocabulary * 2 + tokens * self.hidden * 4
        # Transformers: 16-bit logits, their float32 copy, its logarithms and their gradient
        return tokens * self.vocabulary * 14

    def _free(self) -> int:
        if self.device.type != "cuda":
            available: int = psutil.virtual_memory().available
            return available // 2
        free, total = torch.cuda.mem_get_info(self.device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        usable = min(free + torch.cuda.memory_reserved(self.device), limit)
        return int(usable - SLACK * limit) - torch.cuda.memory_allocated(self.device)
