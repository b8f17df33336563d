"""nybble: QLoRA fine-tuning of Llama 2 and other Llama-architecture models.

The public names are loaded when they are first used, so that `import nybble` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nybble.version import __version__ as __version__

if TYPE_CHECKING:
    from nybble.chat.answerer import Answerer, Sampling
    from nybble.chat.loading import load_answerer as load
    from nybble.data.rows.formats import Message
    from nybble.engine.fuse import fuse, fusion, unfuse
    from nybble.errors import NybbleError
    from nybble.recipe import Recipe, load_recipe
    from nybble.run.folder import Run, open_run
    from nybble.training.train import resume, train

__all__ = [
    "Answerer",
    "Message",
    "NybbleError",
    "Recipe",
    "Run",
    "Sampling",
    "fuse",
    "fusion",
    "load",
    "load_recipe",
    "open_run",
    "resume",
    "train",
    "unfuse",
]

_HOMES = {
    "Answerer": ("nybble.chat.answerer", "Answerer"),
    "Message": ("nybble.data.rows.formats", "Message"),
    "NybbleError": ("nybble.errors", "NybbleError"),
    "Recipe": ("nybble.recipe", "Recipe"),
    "Run": ("nybble.run.folder", "Run"),
    "Sampling": ("nybble.chat.answerer", "Sampling"),
    "fuse": ("nybble.engine.fuse", "fuse"),
    "fusion": ("nybble.engine.fuse", "fusion"),
    "load": ("nybble.chat.loading", "load_answerer"),
    "load_recipe": ("nybble.recipe", "load_recipe"),
    "open_run": ("nybble.run.folder", "open_run"),
    "resume": ("nybble.training.train", "resume"),
    "train": ("nybble.training.train", "train"),
    "unfuse": ("nybble.engine.fuse", "unfuse"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
