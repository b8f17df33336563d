"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)?")
UNITS = {None: 10**9, "GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}
LEAST = 100_000_000  # bytes: less is a slip, such as 12 MB for 12 GB
AUTO = "auto"


def memory_bytes(text: str) -> int | None:
    """A size as in 12GB, 11.5 GiB or 12 (GB) in bytes; None for auto: what is free.

    Raises:
        ValueError: it is not a size, or one that holds no model.
    """
    if text == AUTO:
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r:.40} is not a size of memory; write 12GB, 11.5GiB or auto")
    size = int(float(match[1]) * UNITS[match[2]])
    if size < LEAST:
        raise ValueError(f"{text} is {size:,} bytes, which hold no model; write 12GB, 11.5GiB or auto")
    return size


def _checked(text: str) -> str:
    memory_bytes(text)
    return text


MemorySize = Annotated[str, AfterValidator(_checked)]
