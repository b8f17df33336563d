"""Experiment trackers: they write into the run folder, never prompt the user, and leave the environment unchanged."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import wandb

from nybble.distributed.environment import environment_restored
from nybble.errors import RecipeError
from nybble.installed import install_extra
from nybble.recipe import TrackerOptions
from nybble.run.evaluation import Evaluation, MetricEntry, TaskEntry


@contextlib.contextmanager
def tracking(options: TrackerOptions, folder: pathlib.Path, recipe: Mapping[str, Any]) -> Iterator[str | None]:
    """Prepare the tracker that Trainer's own callback reports to, and close it afterwards.

    Trackers other than wandb read their folder only from the environment; use this inside `environment_restored`.

    Args:
        options: the recipe's tracker section.
        folder: the run folder.
        recipe: all options, logged as hyperparameters.

    Yields:
        A line for the user, or None.

    Raises:
        RecipeError: the tracker's package is not installed.
    """
    if options.to != "none" and find_spec(options.to) is None:
        raise RecipeError(f"tracker.to={options.to}: the package is not installed", fix=install_extra(options.to))
    os.environ.update(_variables(options, folder))
    try:
        yield _start_wandb(options, folder, folder.name, recipe) if options.to == "wandb" else None
    finally:
        if options.to == "wandb" and wandb.run is not None:
            wandb.finish()


def _variables(options: TrackerOptions, folder: pathlib.Path) -> dict[str, str]:
    """The environment variables that set where a tracker writes."""
    if options.to == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard")}
    if options.to == "mlflow":
        database = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        return {"MLFLOW_TRACKING_URI": database, "MLFLOW_EXPERIMENT_NAME": options.project}
    if options.to == "trackio":
        return {"TRACKIO_DIR": str((folder / "trackio").resolve())}
    return {}


def log_evaluation(options: TrackerOptions, folder: pathlib.Path, results: Evaluation) -> str | None:
    """Log the numbers of an evaluation as a separate run in wandb, beside that of the training; not for other trackers.

    Returns:
        A line for the user, or None.
    """
    if options.to != "wandb":
        return None
    entries: list[TaskEntry | MetricEntry] = [*results.tasks, *results.answers]
    numbers = {f"{entry.name}/base": entry.base.mean for entry in entries}
    numbers |= {f"{entry.name}/tuned": entry.tuned.mean for entry in entries}
    if held_out := results.held_out:
        numbers |= {"held-out loss/base": held_out.base.loss, "held-out loss/tuned": held_out.tuned.loss}
    verdicts = [[entry.name, entry.verdict] for entry in entries]
    with environment_restored():
        base = results.base.as_json() if results.base is not None else None
        notice = _start_wandb(options, folder, f"{folder.name}-eval", {"limit": results.limit, "base": base})
        wandb.log({**numbers, "verdicts": wandb.Table(["what", "verdict"], verdicts)})
        wandb.finish()
    return notice


def _start_wandb(options: TrackerOptions, folder: pathlib.Path, name: str, config: Mapping[str, Any]) -> str | None:
    online = wandb_key_present()
    wandb.init(
        project=options.project,
        name=name,
        group=options.group,
        dir=folder,
        config=dict(config),
        mode="online" if online else "offline",
        settings=wandb.Settings(silent=True),
    )
    return None if online else f"wandb runs offline (no key found): wandb sync {folder}/wandb/offline-run-*"


def wandb_key_present() -> bool:
    """Whether wandb finds a key in its settings or ~/.netrc; without a prompt or a connection."""
    return bool(wandb.api.api_key)


def log_samples(tracker: str, step: int, samples: list[dict[str, Any]]) -> None:
    """Log sample answers as a table in wandb; for other trackers, samples.jsonl has them."""
    if tracker == "wandb" and wandb.run is not None:
        columns = ["step", "prompt", "answer", "expected"]
        wandb.log(
            {"samples": wandb.Table(columns, [[sample[column] for column in columns] for sample in samples])},
            commit=False,
        )
