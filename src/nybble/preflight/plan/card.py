"""The GPU of this machine as its driver describes it, and the limit of memory that a recipe names."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from nybble.errors import RecipeError
from nybble.plan.step import CONTEXT
from nybble.recipe.options.memory import memory_bytes
from nybble.terminal import bytes_text

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
SECONDS = 10.0  # until a driver counts as stuck
MIB = 1 << 20


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes that torch may reserve now."""


def find_card() -> Card | None:
    """The first GPU that the driver lists; None if it lists none. torch is not loaded for it."""
    if shutil.which(QUERY[0]) is None:
        return None
    try:
        shown = subprocess.run(QUERY, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_card(shown.stdout) if shown.returncode == 0 else None


def parse_card(shown: str) -> Card | None:
    """The first line of the driver's list; None if it is not one."""
    fields = [field.strip() for field in shown.partition("\n")[0].rsplit(",", 2)]
    if len(fields) != 3 or not (fields[1].isdigit() and fields[2].isdigit()):
        return None
    return Card(fields[0], int(fields[1]) * MIB, max(0, int(fields[2]) * MIB - CONTEXT))


def limit_bytes(text: str | None, card: Card | None) -> int | None:
    """The limit of GPU memory in bytes; None where nothing is known of the GPU.

    Args:
        text: the recipe's train.vram; None for the memory that is free.
        card: this machine's.

    Raises:
        RecipeError: it is more than the card has, or auto without a card.
    """
    if text is None:
        return None if card is None else card.free
    size = memory_bytes(text)
    if size is None:
        if card is None:
            raise RecipeError("train.vram=auto: this machine has no GPU whose memory is free", fix="train.vram=12GB")
        return card.free
    if card is not None and size > card.total:
        raise RecipeError(
            f"train.vram={text}: the {card.name} of this machine has {bytes_text(card.total)}",
            fix="a smaller limit, or train.vram=auto",
        )
    return size
