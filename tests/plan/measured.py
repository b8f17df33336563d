"""Memory and speed of runs that were measured, with the engine as it is.

Memory: `python -m bench.plan run`, H100 80GB and H200, 2026-11-28, packed rows; and earlier runs with dense rows of 2,048
tokens. Runs whose peak was Transformers' final norm are left out: it is fused since. Speeds: docs/benchmarks.md. All have
adapters of rank 16 on all linear layers and NF4 with double quantisation, unless options say otherwise.
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


KEEP, HOST, INPUT, QKV, MLP = (
    f"engine.policy={policy}" for policy in ("keep-all", "host", "layer-input", "drop-qkv", "drop-mlp")
)
QV, PAGED, STREAMED = "lora.targets=[q_proj,v_proj]", "train.optimizer=paged_adamw_8bit", "engine.weights=host"
MEASURED = (
    Measured("llama-2-7b", 4, 2048, (HOST, PAGED), 5.711),
    Measured("llama-2-7b", 4, 2048, (INPUT, PAGED), 7.728),
    Measured("llama-2-7b", 4, 2048, (QKV, PAGED), 11.841),
    Measured("llama-2-7b", 1, 8192, (INPUT, PAGED, "lora.r=8", QV), 7.422),
    Measured("llama-2-7b", 1, 2048, (HOST, PAGED, STREAMED, "engine.embedding=host"), 1.409),
    Measured("llama-2-13b", 2, 2048, (QKV, PAGED, "lora.r=8", QV), 13.340),
    Measured("llama-2-13b", 4, 1024, (HOST, PAGED), 8.957),
    Measured("llama-2-13b", 1, 4096, (HOST, PAGED, STREAMED, "engine.embedding=host"), 2.456),
    Measured("llama-3-8b", 4, 2048, (HOST, PAGED), 7.548),
    Measured("llama-2-7b", 1, 2048, (HOST, "engine.embedding=host"), 4.63),
    Measured("llama-2-7b", 1, 2048, (INPUT,), 5.39),
    Measured("llama-2-7b", 8, 2048, (HOST,), 7.02),
    Measured("llama-2-7b", 4, 2048, (HOST, "lora.r=64"), 7.06),
    Measured("llama-2-7b", 4, 2048, (HOST, QV), 5.43),
    Measured("llama-2-7b", 1, 16384, (HOST, PAGED), 6.755),
    Measured("llama-2-7b", 4, 2048, (HOST, "engine.compute=fp8"), 5.82),
    Measured("llama-2-7b", 4, 2048, (KEEP, PAGED), 29.438),
    Measured("llama-2-7b", 4, 2048, (MLP, PAGED), 18.302),
    Measured("llama-2-13b", 2, 2048, (KEEP, PAGED), 27.519),
    Measured("llama-3-8b", 2, 2048, (KEEP, PAGED), 19.067),
    Measured("llama-3-8b", 1, 8192, (MLP, PAGED, "lora.r=128"), 18.677),
    Measured("smollm2-135m", 16, 2048, (KEEP, PAGED), 12.128),
    Measured("llama-2-13b", 2, 2048, (HOST,), 9.05),
)
PLAIN = (
    Measured("llama-2-7b", 4, 2048, (PAGED, "engine.fused=false"), 8.741),
    Measured("llama-2-7b", 1, 4096, (PAGED, "engine.fused=false"), 6.482),
    Measured("smollm2-135m", 8, 2048, (PAGED, "engine.fused=false"), 1.552),
    Measured("llama-3-8b", 2, 1024, (PAGED, "engine.fused=false"), 7.357),
)
FARTHER = (
    Measured("llama-2-7b", 16, 512, (INPUT, PAGED, "lora.r=64"), 8.445),
    Measured("smollm2-135m", 4, 2048, (HOST, PAGED, STREAMED), 0.342),
    Measured("smollm2-135m", 1, 16384, (INPUT, PAGED), 1.067),
    Measured("llama-3-8b", 1, 2048, (INPUT, PAGED, STREAMED, "engine.embedding=host"), 2.800),
)
"""Within 5% only: a high rank, whose gradients' memory is not modelled well, 16 and 44 MB of a very small model, 80 MB of a
streamed one with a large head."""
LONG = (
    (Measured("llama-2-7b", 1, 20000, (PAGED,), 7.27), 2),
    (Measured("llama-2-7b", 1, 150000, (PAGED, STREAMED), 20.08), 1),
)
"""`python -m bench.limits`, H200, 2026-11-28: so many last layers keep their input, the others have it on the host."""
SPEEDS = (
    Measured("llama-2-7b", 4, 2048, (KEEP,), 30.01, 18045),
    Measured("llama-2-7b", 4, 2048, (HOST,), 5.95, 13310),
    Measured("llama-2-7b", 4, 2048, (KEEP, QV), 29.62, 19288),
    Measured("llama-2-7b", 4, 2048, (HOST, QV), 5.43, 14195),
    Measured("llama-2-7b", 2, 4096, (KEEP,), 30.01, 16699),
    Measured("llama-2-7b", 2, 4096, (HOST,), 5.95, 12481),
    Measured("llama-3-8b", 4, 2048, (KEEP,), 32.25, 16121),
    Measured("llama-3-8b", 4, 2048, (HOST,), 7.84, 12242),
    Measured("llama-2-13b", 2, 2048, (KEEP,), 28.00, 9230),
    Measured("llama-2-13b", 2, 2048, (HOST,), 9.05, 6852),
)
"""Rates of an H100, 2026-11-26."""
FP8 = "engine.compute=fp8"
FP8_GAINS = (
    (Measured("llama-2-7b", 4, 2048, (HOST, FP8), 5.82), 19438 / 13913),
    (Measured("llama-2-7b", 4, 2048, (KEEP, FP8), 43.00), 27119 / 19289),
    (Measured("llama-2-7b", 2, 4096, (KEEP, FP8), 43.00), 24574 / 18021),
)
"""How many times as fast an H200 was in fp8 as in 16 bits, 2026-11-28; with keep-all dequantised weights stayed on it too."""
