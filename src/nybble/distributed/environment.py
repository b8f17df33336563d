"""The environment variables of this process, which are everybody's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def environment_restored() -> Iterator[None]:
    """os.environ is afterwards what it was before: trackers, Transformers and Accelerate all set variables in it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
