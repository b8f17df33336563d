"""How many bytes files take: downloads, quantised copies, run folders and exports. They are computed nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nybble.plan.ledger import ADAPTER, MOMENTS
from nybble.plan.shapes import ModelShape

EXPORT_MARGIN = 1.02  # factor for an export: headers, tokenizer, card and report come on top
CACHE_MARGIN = 1.1  # factor for a quantised copy: other files may be written at the same time
GGUF_BITS: Mapping[str, float] = {"F16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}
"""Bits per weight of the GGUF types that the gguf package writes."""
GGUF_K_BITS: Mapping[str, float] = {
    "Q2_K": 3.2, "Q3_K_S": 3.6, "Q3_K_M": 4.0, "Q3_K_L": 4.3, "Q4_K_S": 4.7, "Q4_K_M": 4.9, "Q5_K_S": 5.6, "Q5_K_M": 5.7,
    "Q6_K": 6.6,
}  # fmt: skip
"""Approximate bits per weight of the types that llama.cpp's own tool makes from an F16 file, as it lists them for Llama 2 7B."""


def download_bytes(shape: ModelShape) -> int:
    """A base's weights on the Hub, in 16 bits."""
    return 2 * shape.parameters.total


def cached_copy_bytes(size: int) -> int:
    """Disk space that must be free for a quantised copy of this size."""
    return int(CACHE_MARGIN * size)


def adapter_file_bytes(trained: int) -> int:
    """A saved adapter.

    Args:
        trained: number of its parameters.
    """
    return trained * ADAPTER


def checkpoint_bytes(trained: int) -> int:
    """The largest checkpoint: the adapter, and AdamW's moments in float32."""
    return trained * (ADAPTER + MOMENTS)


def run_folder_bytes(trained: int, keep: int) -> int:
    """All that a run writes: the checkpoints that it keeps, the best one, the one being written, and the adapter.

    Args:
        trained: number of trained parameters.
        keep: checkpoints kept besides the best.
    """
    return (keep + 2) * checkpoint_bytes(trained) + adapter_file_bytes(trained)


def export_bytes(to: str, parameters: int, quants: Sequence[str] = (), adapter: int = 0) -> int:
    """An export, including the temporary files that exist only while it is written.

    Args:
        to: adapter, merged or gguf.
        parameters: number of the whole model's parameters.
        quants: GGUF types.
        adapter: bytes of the adapter.
    """
    if to == "adapter":
        return int(adapter * EXPORT_MARGIN)
    if to == "merged":
        return int(2 * parameters * EXPORT_MARGIN)
    bits = sum({**GGUF_BITS, **GGUF_K_BITS}[quant] for quant in quants)
    bits += GGUF_BITS["F16"] if set(quants) & set(GGUF_K_BITS) else 0.0  # the K types are made from it
    return int(parameters * bits / 8 * EXPORT_MARGIN)
