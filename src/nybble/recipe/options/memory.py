"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(gb|gib|mb|mib)?", re.IGNORECASE)
UNITS = {"gb": 10**9, "gib": 1 << 30, "mb": 10**6, "mib": 1 << 20}
LEAST = 100_000_000  # bytes: less is a slip, such as 12 MB for 12 GB
AUTO = "auto"
FORMS = "write 12GB, 11.5GiB or auto"


def memory_bytes(text: str) -> int | None:
    """A size as in 12GB, 11.5 GiB or 12 (GB) in bytes; None for auto: what is free.

    Raises:
        ValueError: it is not a size, or one that holds no model.
    """
    if text == AUTO:
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r:.40} is not a size of memory; {FORMS}")
    size = int(float(match[1]) * UNITS[(match[2] or "GB").lower()])
    if size < LEAST:
        raise ValueError(f"{text} is {size:,} bytes, which hold no model; {FORMS}")
    return size


def _as_text(value: Any) -> Any:
    """A number as text: YAML reads 12 as one."""
    return str(value) if type(value) in (int, float) else value


def _checked(text: str) -> str:
    memory_bytes(text)
    return text


MemorySize = Annotated[str, BeforeValidator(_as_text), AfterValidator(_checked)]
