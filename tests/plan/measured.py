"""Memory and speed of runs that were measured: docs/benchmarks.md, and held-back shapes of 2026-11-26, H100s and H200s.

All have adapters of rank 16 on all linear layers, 8-bit AdamW, NF4 with double quantisation and dense rows, unless options say
otherwise.
"""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """A run."""

    model: str
    rows: int
    length: int
    options: tuple[str, ...]
    reserved: float
    """torch.cuda.max_memory_reserved in 10^9 bytes."""
    tokens_per_second: float | None = None
    """On an H100; None where it was another card, or another program ran beside it."""
    limit: float | None = None
    """Enforced, in 10^9 bytes."""


KEEP, HOST, QV = "engine.policy=keep-all", "engine.policy=host", "lora.targets=[q_proj,v_proj]"
MEASURED = (
    Measured("llama-2-7b", 4, 2048, (KEEP,), 30.01, 18045),
    Measured("llama-2-7b", 4, 2048, (HOST,), 5.95, 13310),
    Measured("llama-2-7b", 1, 2048, (HOST, "engine.embedding=host"), 4.63),
    Measured("llama-2-7b", 1, 2048, ("engine.policy=layer-input",), 5.39),
    Measured("llama-2-7b", 8, 2048, (HOST,), 7.02),
    Measured("llama-2-7b", 4, 2048, (HOST, "lora.r=64"), 7.06),
    Measured("llama-2-7b", 4, 2048, (KEEP, QV), 29.62, 19288),
    Measured("llama-2-7b", 4, 2048, (HOST, QV), 5.43, 14195),
    Measured("llama-2-7b", 2, 4096, (KEEP,), 30.01, 16699),
    Measured("llama-2-7b", 2, 4096, (HOST,), 5.95, 12481),
    Measured("llama-2-7b", 1, 20000, (HOST,), 7.40),
    Measured("llama-2-7b", 1, 120000, (HOST,), 21.42),
    Measured("llama-3-8b", 4, 2048, (KEEP,), 32.25, 16121),
    Measured("llama-3-8b", 4, 2048, (HOST,), 7.84, 12242),
    Measured("llama-2-13b", 2, 2048, (KEEP,), 28.00, 9230),
    Measured("llama-2-13b", 2, 2048, (HOST,), 9.05, 6852),
    Measured("llama-2-7b", 1, 2048, ("engine.embedding=host",), 4.90, None, 5.15),
    Measured("llama-2-7b", 4, 2048, (), 43.08, None, 140.0),
    Measured("llama-2-7b", 4, 2048, (), 34.54, None, 36.9),
    Measured("llama-2-7b", 4, 2048, ("lora.r=64",), 34.87, None, 37.8),
    Measured("llama-2-7b", 8, 2048, (), 68.68, None, 140.0),
)
