"""The frozen token embedding on the host: a batch needs only a few thousand of its rows."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch

from nybble.errors import EngineError
from nybble.weights.moving import stay


class EmbeddingOnHost:
    """Moves a backbone's embedding to pinned host memory; looked-up rows are copied to the device.

    Raises:
        EngineError: an embedding that is trained, or that is also the head.
    """

    def __init__(self, backbone: Any, device: torch.device) -> None:
        embedding: Any = backbone.embed_tokens
        self.embedding: Any = embedding
        self.device = device
        is_plain: bool = type(embedding) is torch.nn.Embedding
        if not is_plain or embedding.weight.requires_grad:
            raise EngineError("the embedding is trained and cannot stay on the host", fix='embedding="device"')
        if backbone.config.tie_word_embeddings:
            raise EngineError("the embedding is also the head, which is needed on the device", fix='embedding="device"')
        weight = embedding.weight.data.cpu()
        embedding.weight.data = weight.pin_memory() if device.type == "cuda" else weight
        # Transformers and scripts take the first parameter's device for the model's: a norm's, no longer the embedding's.
        self._modules: dict[str, Any] = backbone._modules
        self._order = list(self._modules)
        _reorder(self._modules, ["norm", *(name for name in self._order if name != "norm")])
        embedding.nybble_device = device
        embedding.forward = types.MethodType(_look_up, embedding)
        stay(embedding)  # Accelerate moves the whole model to its device before training

    def remove(self) -> None:
        """Move the embedding back to its device."""
        del self.embedding.forward, self.embedding._apply, self.embedding.nybble_device
        self.embedding.weight.data = self.embedding.weight.data.to(self.device)
        _reorder(self._modules, self._order)


def _reorder(modules: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        modules[name] = modules.pop(name)


def _look_up(self: Any, ids: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.embedding(ids.cpu(), self.weight.detach())
    result: torch.Tensor = rows.to(self.nybble_device, non_blocking=True)
    return result
