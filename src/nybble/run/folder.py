"""The run folder: its layout, how it is created, and how it is opened again.

RUN/recipe.yaml       every option, documented; its steps may be split otherwise than in start.json, into a micro batch that fits
                      in memory, or among another number of processes
RUN/start.json        recipe, versions, fingerprints of data and base, the base's quantised bits, and digests of the next two;
                      written before the first step (`nybble.run.start`)
RUN/template.json     the chat template by name and text
RUN/tokenizer/        tokenizer with that template
RUN/learning_rate.json, .png
                      how the learning rate was found, if the recipe said auto (`nybble.run.rate`)
RUN/checkpoints/      checkpoint-N, each complete once it contains a file COMPLETE (`nybble.training.checkpoints`)
RUN/metrics.jsonl     one line per step, and one per evaluation (`nybble.run.log`)
RUN/samples.jsonl     answers to validation prompts at each evaluation
RUN/adapter/          the PEFT adapter, with its own COMPLETE: once it exists, training has ended
RUN/summary.json      results, sizes, speed, versions (`nybble.run.summary`)
RUN/loss.png          the loss curve
RUN/README.md         model card
RUN/evaluation.json   what nybble eval measured (`nybble.run.evaluation`); RUN/report.html, report.md and report/ show it
RUN/export/           what nybble export wrote: adapter, merged and gguf, each in its own folder
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from nybble.errors import ModelError, RecipeError, RunError
from nybble.files.atomic import new_folder, refuse_busy
from nybble.files.paths import check_free_space
from nybble.files.reading import RESTORE, read_object
from nybble.files.writing import write_text
from nybble.plan.file_bytes import run_folder_bytes
from nybble.recipe import Recipe, absolute_path, absolute_paths, dump_recipe, load_recipe
from nybble.run.evaluation import Evaluation
from nybble.run.marks import COMPLETE, check_adapter, described
from nybble.run.rate import FoundRate
from nybble.run.records import read_record
from nybble.run.start import Start, check_recipe, read_start, write_start
from nybble.run.summary import Summary

CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")  # checkpoint-best, for example, is not nybble's


@dataclass(frozen=True)
class Run:
    """A run folder, or the folder of a PEFT adapter from elsewhere."""

    folder: pathlib.Path
    recipe: Recipe

    @property
    def adapter(self) -> pathlib.Path:
        """The adapter's folder."""
        return self.folder if self.is_bare_adapter else self.folder / "adapter"

    @property
    def is_bare_adapter(self) -> bool:
        """Whether this is an adapter folder without a run."""
        return not (self.folder / "recipe.yaml").exists()

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object per line: a step, and what was measured at it."""
        return self.folder / "metrics.jsonl"

    @property
    def system(self) -> str:
        """The system message of most training rows; empty where there is none, and in runs before 0.6."""
        summary = self.summary()
        return summary.data.system if summary is not None else ""

    @property
    def samples(self) -> pathlib.Path:
        """One JSON object per line: an answer to a validation prompt."""
        return self.folder / "samples.jsonl"

    def summary(self) -> Summary | None:
        """The content of summary.json; None for a bare adapter, and before training has ended.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "summary.json"
        return None if self.is_bare_adapter or not file.exists() else read_record(file, Summary)

    def evaluation(self) -> Evaluation | None:
        """The content of evaluation.json; None before `nybble eval`.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "evaluation.json"
        fix = f"write it again: nybble eval {self.folder}; or do without it: rm {shlex.quote(str(file))}"
        return read_record(file, Evaluation, fix) if file.exists() else None

    def found_rate(self) -> FoundRate | None:
        """The content of learning_rate.json; None where the recipe names the learning rate.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "learning_rate.json"
        return read_record(file, FoundRate) if file.exists() else None

    def start(self) -> Start:
        """The content of start.json.

        Raises:
            RunError: it is damaged or missing.
        """
        return read_start(self.folder / "start.json")

    def numbered_checkpoints(self) -> list[pathlib.Path]:
        """The folders named like checkpoints, the newest first, complete or not."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        folders = [path for path in paths if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=step_of, reverse=True)

    def latest_checkpoint(self) -> pathlib.Path | None:
        """The newest checkpoint that is marked as complete; `nybble.training.checkpoints` checks whether it still is."""
        return next((folder for folder in self.numbered_checkpoints() if (folder / COMPLETE).exists()), None)


@contextlib.contextmanager
def create_run(folder: pathlib.Path, recipe: Recipe, start: Start) -> Iterator[pathlib.Path]:
    """Create a run folder, completely or not at all; the caller writes tokenizer and template to the yielded path.

    Raises:
        RunError: the folder exists.
    """
    refuse_existing(folder)
    try:
        with new_folder(folder) as temporary:
            write_text(temporary / "recipe.yaml", dump_recipe(recipe))
            (temporary / "checkpoints").mkdir()
            yield temporary
            write_start(temporary / "start.json", start, described(temporary, {"recipe.yaml"}))
    except FileExistsError:
        refuse_existing(folder)
        raise


def change_recipe(run: Run, recipe: Recipe) -> Run:
    """Record a recipe that splits the run's steps otherwise, into micro batches and processes; start.json keeps the first one."""
    write_text(run.folder / "recipe.yaml", dump_recipe(recipe))
    return Run(run.folder, recipe)


def refuse_existing(folder: pathlib.Path) -> None:
    """Raise RunError where the folder exists already."""
    if folder.exists():
        is_run = (folder / "recipe.yaml").is_file()
        resume = f"to resume it: nybble train --resume {folder}; for a new run: " if is_run else ""
        raise RunError(
            f"{folder} exists already",
            fix=f"{resume}out=ANOTHER",
        )


def refuse_unfinished(run: Run) -> None:
    """Raise RunError where a run has no adapter: it is being trained, or its training was interrupted."""
    if not (run.adapter / "adapter_config.json").is_file():
        refuse_busy(run.folder)
        raise RunError(
            f"{run.folder} has no adapter: its training has not ended",
            fix=f"nybble train --resume {run.folder}",
        )


def check_disk_space(folder: pathlib.Path, trained: int, keep: int) -> None:
    """Check that the kept checkpoints, the best, the one being written and the adapter fit on the disk.

    Args:
        folder: the run folder, which need not exist yet.
        trained: number of trained parameters.
        keep: checkpoints kept besides the best.

    Raises:
        RunError: they do not fit; with the space that is needed and the space that is free.
    """
    check_free_space(
        folder, run_folder_bytes(trained, keep), "the run's folder", "free some space, or out=FOLDER on another disk"
    )


def open_run(path: str | pathlib.Path, base: str | None = None) -> Run:
    """Open a run, or a PEFT adapter folder.

    Local paths in its recipe become absolute. Runs before 0.6 recorded them as they were typed: these are relative to the current
    folder. A base that was a folder is never looked up on the Hub, even if the folder is gone.

    Args:
        path: the folder.
        base: the new path of the base model, if it moved.

    Raises:
        RecipeError: a recipe.yaml that cannot be read.
        RunError: there is no run, or its recipe or adapter is not what training wrote.
        ModelError: an adapter whose configuration cannot be read.
    """
    folder = pathlib.Path(path)
    if (folder / "recipe.yaml").exists():
        recipe = _recorded_recipe(folder)
        if is_base_a_folder(folder):
            recipe = _with_base(recipe, absolute_path(recipe.model.path))
    elif (folder / "adapter_config.json").exists():
        recipe = Recipe() if base is not None else _with_base(Recipe(), _base_of_adapter(folder))
    else:
        what = f"there is no folder {folder}" if not folder.exists() else f"{folder} is neither a run nor an adapter"
        raise RunError(f"{what} (no recipe.yaml, no adapter_config.json)", fix="ls runs/")
    if base is not None:
        recipe = absolute_paths(_with_base(recipe, base, revision=None))
    run = Run(folder, recipe)
    check_adapter(run.adapter)
    return run


def _recorded_recipe(run: pathlib.Path) -> Recipe:
    """A run's recipe.yaml with absolute paths, compared with start.json."""
    file = run / "recipe.yaml"
    try:
        recipe = absolute_paths(load_recipe(file))
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where, fix=RESTORE) from error
    check_recipe(recipe, file)
    return recipe


def _with_base(recipe: Recipe, base: str, **changes: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base, **changes})})


def is_base_a_folder(run: pathlib.Path) -> bool:
    """Whether a run's record says that its base was a folder, not a commit of the Hub."""
    file = run / "start.json"
    is_run = file.exists() and (run / "recipe.yaml").exists()  # the folder above a bare adapter may be anything
    return is_run and read_start(file).is_base_a_folder


def _base_of_adapter(folder: pathlib.Path) -> str:
    """The base that PEFT recorded. A relative path is relative to the current folder, or else to the adapter's."""
    name = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise ModelError(
            "base_model_name_or_path is not text",
            where=str(folder / "adapter_config.json"),
            fix="--base FOLDER names the base",
        )
    paths = [pathlib.Path(name), folder / name] if name else []
    if base := next((path for path in paths if path.is_dir()), None):
        return absolute_path(str(base))
    return absolute_path(name) if name and is_base_a_folder(folder.absolute().parent) else name


def choose_folder(recipe: Recipe) -> pathlib.Path:
    """The folder that the recipe names, or runs/MODEL-DATA, with a number if that exists."""
    if recipe.out is not None:
        return pathlib.Path(recipe.out)
    name = default_name(recipe)
    folder, number = pathlib.Path("runs") / name, 2
    while folder.exists():
        folder, number = pathlib.Path("runs") / f"{name}-{number}", number + 1
    return folder


def default_name(recipe: Recipe) -> str:
    """MODEL-DATA."""
    stems = [pathlib.Path(part).name.split(".")[0] for part in (recipe.model.path, recipe.data.names[0])]
    return "-".join(stem if re.fullmatch(r"[\w-]+", stem) else "run" for stem in stems)  # a pattern is not a name


def step_of(checkpoint: pathlib.Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])
