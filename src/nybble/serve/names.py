"""How runs and their base are called in the API, and where a merged model is."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from nybble.errors import RunError, ServeError
from nybble.run.folder import Run


def merged_folder(run: Run, engine: str) -> pathlib.Path:
    """The folder of a run's merged model.

    Raises:
        ServeError: the run has not been merged.
    """
    folder = run.folder / "export" / "merged"
    if not (folder / "config.json").exists():
        raise ServeError(
            f"the engine {engine} needs a merged model, but {run.folder} has none",
            where=str(folder),
            fix=f"nybble export {run.folder} --to merged",
        )
    return folder


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names in the API: those of their folders."""
    folders = {run.folder.resolve().name: run.folder for run in runs}
    if len(folders) < len(runs):
        duplicate = next(run for run in runs if folders[run.folder.resolve().name] is not run.folder)
        name = duplicate.folder.resolve().name
        raise RunError(
            f"two runs have the name {name}, but requests choose by name: {duplicate.folder} and {folders[name]}",
            fix="rename one of the folders; a run can be moved",
        )
    return list(folders)


def base_name(run: Run, taken: Sequence[str]) -> str:
    """The base's name in the API: its Hub id, or its folder's name; never a path."""
    path = run.recipe.model.path
    name = pathlib.Path(path).resolve().name if pathlib.Path(path).exists() else path
    return f"{name}-base" if name in taken else name
