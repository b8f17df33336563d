"""The GPU of this machine as its driver describes it, and limits of memory as people write them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from nybble.errors import RecipeError
from nybble.terminal import bytes_text

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
SECONDS = 10.0  # until a driver counts as stuck
MIB = 1 << 20
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)?")
UNITS = {None: 10**9, "GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": MIB}
LEAST = 100_000_000  # bytes: a limit below it is a slip, such as 12 MB for 12 GB


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes that no process uses now."""


def find_card() -> Card | None:
    """The first GPU of this machine; None if the driver shows none. torch is not loaded for it."""
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
    return Card(fields[0], int(fields[1]) * MIB, int(fields[2]) * MIB)


def limit_bytes(text: str, card: Card | None) -> int:
    """A limit of GPU memory in bytes.

    Args:
        text: as in 12GB, 11.5 GiB, 12 (GB), or auto: the memory that is free.
        card: this machine's.

    Raises:
        RecipeError: it is not a size, is more than the card has, or auto without a card.
    """
    if text == "auto":
        if card is None:
            raise RecipeError(
                "--vram auto: this machine has no GPU whose memory is free", fix="name the memory: --vram 12GB"
            )
        return card.free
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"--vram {text}: this is not a size of memory", fix="--vram 12GB, 11.5GiB or auto")
    size = int(float(match[1]) * UNITS[match[2]])
    if size < LEAST:
        raise RecipeError(f"--vram {text}: {size:,} bytes hold no model", fix="--vram 12GB")
    if card is not None and size > card.total:
        raise RecipeError(
            f"--vram {text}: the {card.name} of this machine has {bytes_text(card.total)}",
            fix="a smaller limit, or --vram auto",
        )
    return size
