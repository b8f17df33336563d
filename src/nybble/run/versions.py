"""The versions of everything that affects a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform

from nybble.version import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python, nybble and the packages that affect the numbers."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "nybble": __version__, **installed}
