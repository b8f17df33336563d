"""The environment variables of this process, which libraries change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def environment_restored() -> Iterator[None]:
    """Restore os.environ afterwards: trackers, Transformers and Accelerate all set variables in it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
