"""Which attention backends are chosen for a device, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.engine.attention.backend import Backend, Segments
from nybble.engine.attention.cuda import Cudnn, Efficient, Flash
from nybble.engine.attention.plain import FlashOnCpu, PlainAttention


@dataclass(frozen=True)
class AttentionChoice:
    """The backends of a model, and the reason."""

    equal: Backend
    packed: Backend
    reason: str

    def of(self, segments: Segments) -> Backend:
        """The backend for a batch."""
        return self.equal if segments.bounds is None else self.packed


def choose(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_size: int) -> AttentionChoice:
    """The fastest backends that compute these heads on this device, found by trying them on a small batch."""
    if device.type == "cpu":
        return AttentionChoice(FlashOnCpu(), FlashOnCpu(), FlashOnCpu.name)
    if device.type != "cuda" or dtype == torch.float32:
        what = device.type if device.type != "cuda" else "float32"
        return AttentionChoice(PlainAttention(), PlainAttention(), f"no fused attention for {what}")
    refused: list[str] = []
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    sizes = (heads, key_heads, head_size)
    equal = _first([*([Cudnn()] if hopper else []), Flash(), Efficient()], device, dtype, sizes, False, refused)
    packed = _first([Flash(), Efficient()], device, dtype, sizes, True, refused)
    names = equal.name if equal.name == packed.name else f"{equal.name}, {packed.name} for packed rows"
    return AttentionChoice(equal, packed, "; ".join([names, *dict.fromkeys(refused)]))


def _first(
    backends: list[Backend],
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    packed: bool,
    refused: list[str],
) -> Backend:
    heads, key_heads, head_size = sizes
    bounds = torch.tensor([0, 16, 64], dtype=torch.int32, device=device) if packed else None
    segments = Segments(1, 64, bounds, 48)
    query = torch.zeros(64, heads, head_size, dtype=dtype, device=device)
    key = torch.zeros(64, key_heads, head_size, dtype=dtype, device=device)
    for backend in backends:
        try:
            out, saved = backend.forward(query, key, key, segments)
            backend.backward(out, query, key, key, out, saved, segments)
        except RuntimeError as error:
            refused.append(f"{backend.name} refused: {str(error).splitlines()[0]}")
            continue
        return backend
    refused.append("using plain torch, with memory quadratic in the length")
    return PlainAttention()
