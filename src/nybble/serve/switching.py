"""How long a thread may keep the interpreter while another waits for it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

SWITCH_INTERVAL = 0.0002
"""Seconds for which a thread may keep the interpreter while another waits for it; CPython's default is 5 ms. Generation runs
Python between small kernels, and the thread that sends tokens waits for it. On an H200 a served token took 4 to 13 ms longer than
one of generate alone, whichever model and engine (docs/benchmarks.md)."""


@contextlib.contextmanager
def short_switch_interval() -> Iterator[None]:
    """Set the interpreter's thread switch interval to SWITCH_INTERVAL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
