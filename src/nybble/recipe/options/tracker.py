"""The recipe's section `tracker`."""

from __future__ import annotations

from typing import Literal

from nybble.recipe.options.section import Options


class TrackerOptions(Options):
    """Experiment tracker, besides RUN/metrics.jsonl."""

    to: Literal["none", "wandb", "tensorboard", "mlflow", "trackio"] = "none"
    """Tracker; wandb runs offline if it finds no key, and never prompts for one."""
    project: str = "nybble"
    """Project or experiment name in the tracker."""
    group: str | None = None
    """Group of the run in wandb; a sweep gives its trials its own name."""
