"""Sizes of well-known bases, so that a plan needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nybble.plan.shapes import LLAMA_2_7B, ModelShape


class KnownModel(NamedTuple):
    """A base whose sizes are built in."""

    hub_id: str
    shape: ModelShape


KNOWN: Mapping[str, KnownModel] = {
    "llama-2-7b": KnownModel("meta-llama/Llama-2-7b-hf", LLAMA_2_7B),
    "llama-2-13b": KnownModel("meta-llama/Llama-2-13b-hf", ModelShape(5120, 13824, 40, 40, 40, 128, 32000, 4096)),
    "llama-2-70b": KnownModel("meta-llama/Llama-2-70b-hf", ModelShape(8192, 28672, 80, 64, 8, 128, 32000, 4096)),
    "llama-3-8b": KnownModel("meta-llama/Meta-Llama-3-8B", ModelShape(4096, 14336, 32, 32, 8, 128, 128256, 8192)),
    "llama-3-70b": KnownModel("meta-llama/Meta-Llama-3-70B", ModelShape(8192, 28672, 80, 64, 8, 128, 128256, 8192)),
    "tinyllama": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", ModelShape(2048, 5632, 22, 32, 4, 64, 32000, 2048)),
    "smollm2-135m": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", ModelShape(576, 1536, 30, 9, 3, 64, 49152, 8192, tied=True)
    ),
}
"""By the names that `nybble plan` takes."""
VARIANTS = ("-chat-hf", "-hf", "-chat", "-instruct")
"""Endings of the names of variants, which have the same sizes."""


def known_model(name: str) -> KnownModel | None:
    """A known base, named as in `KNOWN` or as on the Hub; None for another."""
    plain = _plain(name)
    return KNOWN.get(plain) or next((known for known in KNOWN.values() if _plain(known.hub_id) == plain), None)


def _plain(name: str) -> str:
    name = name.lower()
    for ending in VARIANTS:
        name = name.removesuffix(ending)
    return name
