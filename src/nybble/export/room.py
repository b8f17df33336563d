"""Room on the disk, before anything is written."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence

from nybble.errors import ExportError
from nybble.export.formats import BITS, K_QUANTS

SPARE = 1.02  # headers, tokenizer, card and report come on top


def needed(to: str, parameters: int, quants: Sequence[str] = (), adapter: int = 0) -> int:
    """Bytes of an artefact, with what stands beside it while it is written.

    Args:
        to: adapter, merged or gguf.
        parameters: of the whole model.
        quants: GGUF types.
        adapter: bytes of the adapter.
    """
    if to == "adapter":
        return int(adapter * SPARE)
    if to == "merged":
        return int(2 * parameters * SPARE)
    halfway = BITS["F16"] if set(quants) & set(K_QUANTS) else 0.0
    return int(parameters * (sum(BITS[quant] for quant in quants) + halfway) / 8 * SPARE)


def check_disk(folder: pathlib.Path, size: int, what: str) -> None:
    """Refuse where the disk of a folder, which need not exist, has not so many bytes free.

    Raises:
        ExportError: with what is needed and what is free.
    """
    place = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise ExportError(
            f"{what} needs about {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free",
            where=str(place),
            fix="free some space, or --out FOLDER on another disk",
        )
