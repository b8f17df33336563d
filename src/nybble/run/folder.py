"""The run folder: its layout, atomic writes, what a resumed run is held against, and how it is opened again.

RUN/recipe.yaml       every option, documented
RUN/start.json        fingerprints of recipe, data, base, its quantised bits and versions, and digests of the two that follow,
                      written before the first step
RUN/template.json     the chat template by name and text
RUN/tokenizer/        tokenizer with that template
RUN/checkpoints/      checkpoint-N, each whole once it holds a file COMPLETE (`nybble.training.checkpoints`)
RUN/metrics.jsonl     a line a step, and a line an evaluation
RUN/samples.jsonl     answers to validation prompts at each evaluation
RUN/adapter/          the PEFT adapter, with a COMPLETE of its own: its appearance means that training has ended
RUN/summary.json      results, sizes, speed, versions
RUN/loss.png          the loss curve
RUN/README.md         model card
RUN/evaluation.json   what nybble eval measured; RUN/report.html, report.md and report/ show it
RUN/export/           what nybble export made: adapter, merged, gguf, each a folder of its own
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import ModelError, RecipeError, RunError
from nybble.files.digests import faults
from nybble.files.places import check_disk, new_folder, refuse_busy, replacing
from nybble.files.reading import RESTORE, read_object
from nybble.plan.ledger import run_folder_bytes
from nybble.recipe import PLACES, Recipe, absolute_paths, absolute_tree, dump_recipe, here, load_recipe
from nybble.run.marks import COMPLETE, check_adapter, described
from nybble.run.records import Evaluation, Start, Summary
from nybble.version import __version__

CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")  # the name of one; checkpoint-best is somebody else's
FILES = "files"  # in start.json: what tokenizer and template held when the run began
QUANTIZED = "quantized_base"  # in start.json: the bits of the base that nybble quantised, and how they were made
DECIDING = ("model", "adapter", "lora", "data", "train")  # options that a run's numbers come from
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Run:
    """A run folder, or a PEFT adapter folder that somebody else made."""

    folder: pathlib.Path
    recipe: Recipe

    @property
    def adapter(self) -> pathlib.Path:
        """The adapter's folder."""
        return self.folder if self.is_bare_adapter else self.folder / "adapter"

    @property
    def is_bare_adapter(self) -> bool:
        """Whether this is an adapter folder without a run around it."""
        return not (self.folder / "recipe.yaml").exists()

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a line: step and what was measured there."""
        return self.folder / "metrics.jsonl"

    @property
    def system(self) -> str:
        """The system message that most training rows begin with; empty where there is none, or an older version made the run."""
        summary = self.summary()
        return str(summary["data"].get("system", "")) if summary is not None else ""

    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None of a bare adapter, and before training has ended.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "summary.json"
        return None if self.is_bare_adapter or not file.exists() else read_object(file, RunError, RESTORE, Summary)

    def evaluation(self) -> dict[str, Any] | None:
        """What evaluation.json holds; None before `nybble eval`.

        Raises:
            RunError: it is damaged.
        """
        file = self.folder / "evaluation.json"
        again = f"write it again: nybble eval {self.folder}; or do without: rm {shlex.quote(str(file))}"
        return read_object(file, RunError, again, Evaluation) if file.exists() else None

    def start(self) -> dict[str, Any]:
        """What start.json holds.

        Raises:
            RunError: it is damaged or missing.
        """
        return read_object(self.folder / "start.json", RunError, RESTORE, Start)

    def numbered(self) -> list[pathlib.Path]:
        """The folders that are called as checkpoints are, the newest first, whole or not."""
        places = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        found = [place for place in places if CHECKPOINT.fullmatch(place.name) and place.is_dir()]
        return sorted(found, key=step_of, reverse=True)

    def latest_checkpoint(self) -> pathlib.Path | None:
        """The newest checkpoint that is marked as whole; whether it still is, `nybble.training.checkpoints` proves."""
        return next((folder for folder in self.numbered() if (folder / COMPLETE).exists()), None)


@contextlib.contextmanager
def create_run(folder: pathlib.Path, recipe: Recipe, start: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    """Make a run folder, complete or not at all: what else belongs to its beginning is written to the path that is given.

    Raises:
        RunError: the folder exists.
    """
    refuse_existing(folder)
    try:
        with new_folder(folder) as temporary:
            write_text(temporary / "recipe.yaml", dump_recipe(recipe))
            (temporary / "checkpoints").mkdir()
            yield temporary
            write_json(temporary / "start.json", {**start, FILES: described(temporary, {"recipe.yaml"})})
    except FileExistsError:
        refuse_existing(folder)
        raise


def check_beginning(run: Run) -> None:
    """Hold tokenizer and template against what they were when the run began; versions before 0.7 did not record that.

    Raises:
        RunError: naming the file, or the record is damaged.
    """
    record = run.folder / "start.json"
    if run.is_bare_adapter or not record.exists():
        return
    if wrong := faults(run.folder, run.start().get(FILES) or {}):
        raise RunError(
            f"the run is damaged: {wrong[0]}",
            where=str(run.folder),
            fix=f'{RESTORE}; if you changed it yourself: delete "{FILES}" from {record}',
        )


def refuse_existing(folder: pathlib.Path) -> None:
    """Raise RunError where a run stands already."""
    if folder.exists():
        is_run = (folder / "recipe.yaml").is_file()
        resume = f"to resume it: nybble train --resume {folder}; for a new run: " if is_run else ""
        raise RunError(
            f"{folder} exists already",
            fix=f"{resume}out=ANOTHER",
        )


def refuse_unfinished(run: Run) -> None:
    """Raise RunError where a run has no adapter: another process trains it, or its training was cut off."""
    if not (run.adapter / "adapter_config.json").is_file():
        refuse_busy(run.folder)
        raise RunError(
            f"{run.folder} has no adapter: its training has not ended",
            fix=f"nybble train --resume {run.folder}",
        )


def check_room(folder: pathlib.Path, trained: int, keep: int) -> None:
    """The checkpoints that are kept, the best, the one being written and the adapter must fit on the disk.

    Args:
        folder: the run folder, which need not exist yet.
        trained: trained parameters.
        keep: checkpoints kept beside the best.

    Raises:
        RunError: with what is needed and what is free.
    """
    check_disk(
        folder, run_folder_bytes(trained, keep), "the run's folder", "free some space, or out=FOLDER on another disk"
    )


def open_run(path: str | pathlib.Path, base: str | None = None) -> Run:
    """Open a run, or a PEFT adapter folder.

    Local places in its recipe are absolute, also those of runs before 0.6, which recorded them as typed: they are looked
    for from the current folder. A base that was a folder is a folder, even where it is gone: the Hub is not asked for it.

    Args:
        path: the folder.
        base: where the base model is now, if it moved.

    Raises:
        RecipeError: a recipe.yaml that cannot be read.
        RunError: no run there, or its recipe or its adapter is not what training wrote.
        ModelError: an adapter whose configuration cannot be read.
    """
    folder = pathlib.Path(path)
    if (folder / "recipe.yaml").exists():
        recipe = _recorded_recipe(folder)
        if recorded_folder(folder):
            recipe = _on_base(recipe, here(recipe.model.path))
    elif (folder / "adapter_config.json").exists():
        recipe = Recipe() if base is not None else _on_base(Recipe(), _base_of_adapter(folder))
    else:
        what = f"there is no folder {folder}" if not folder.exists() else f"{folder} is neither a run nor an adapter"
        raise RunError(f"{what} (no recipe.yaml, no adapter_config.json)", fix="ls runs/")
    if base is not None:
        recipe = absolute_paths(_on_base(recipe, base, revision=None))
    run = Run(folder, recipe)
    check_adapter(run.adapter)
    return run


def _recorded_recipe(run: pathlib.Path) -> Recipe:
    """A run's recipe.yaml, held against the record of how it began: a file that lost its end is good YAML with other options.

    Places may have changed since, and so may what decides none of the run's numbers.
    """
    file = run / "recipe.yaml"
    try:
        recipe = absolute_paths(load_recipe(file))
    except RecipeError as error:
        raise RecipeError(error.what, where=error.where, fix=RESTORE) from error
    if not (run / "start.json").exists():
        return recipe
    now = json.loads(json.dumps(recipe.model_dump(include=set(DECIDING))))
    recorded = _with_defaults(read_object(run / "start.json", RunError, RESTORE, Start)["recipe"])
    then = {name: recorded[name] for name in now}
    for place in (*PLACES, "model.device"):
        *section, name = place.split(".")
        before, after = (tree[section[0]] if section else tree for tree in (then, now))
        if after.get(name) and type(after[name]) is type(before.get(name)):
            after[name] = before[name]
    if changes := _differences(then, now, ""):
        raise RunError(
            "recipe.yaml is not the recipe that this run began with:\n"
            + "\n".join(f"  - {change}" for change in changes),
            where=f"{file}, held against start.json",
            fix=f"{RESTORE}, or undo these changes; for another recipe start a new run: nybble train -c {file} out=ANOTHER",
        )
    return recipe


def _on_base(recipe: Recipe, base: str, **changes: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base, **changes})})


def recorded_folder(run: pathlib.Path) -> bool:
    """Whether a run's record says that its base was a folder: then it names the weights, and no commit of the Hub."""
    file = run / "start.json"
    is_run = file.exists() and (run / "recipe.yaml").exists()  # above a bare adapter may lie anything
    return is_run and str(read_object(file, RunError, RESTORE, Start)["base"]).startswith("sha256:")


def _base_of_adapter(folder: pathlib.Path) -> str:
    """The base that PEFT recorded. A relative path is looked for from the current folder, then from the adapter's."""
    name = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise ModelError(
            "base_model_name_or_path is no text",
            where=str(folder / "adapter_config.json"),
            fix="--base FOLDER names the base",
        )
    places = [pathlib.Path(name), folder / name] if name else []
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return here(str(found))
    return here(name) if name and recorded_folder(folder.absolute().parent) else name


def choose_folder(recipe: Recipe) -> pathlib.Path:
    """The recipe's own, or runs/MODEL-DATA, numbered when that is taken."""
    if recipe.out is not None:
        return pathlib.Path(recipe.out)
    stems = [pathlib.Path(part).name.split(".")[0] for part in (recipe.model.path, recipe.data.names[0])]
    name = "-".join(stem if re.fullmatch(r"[\w-]+", stem) else "run" for stem in stems)  # a pattern is no name
    folder, number = pathlib.Path("runs") / name, 2
    while folder.exists():
        folder, number = pathlib.Path("runs") / f"{name}-{number}", number + 1
    return folder


def versions() -> dict[str, str]:
    """Versions of Python and of everything that decides a number."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "nybble": __version__, **installed}


def start_record(recipe: Recipe, data: str, base: str, quantized: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a resumed run must find unchanged; the recipe's local places are absolute. The bits of the quantised base are held
    against their record when the base is loaded."""
    record = {"recipe": recipe.model_dump(exclude={"out"}), "data": data, "base": base, "versions": versions()}
    return {**record, QUANTIZED: quantized}


def check_unchanged(run: Run, now: Mapping[str, Any]) -> None:
    """Hold a run that is resumed against how it began, by whichever version of nybble.

    Raises:
        RunError: listing what changed, from what to what.
    """
    then = run.start()
    then["recipe"] = _with_defaults(absolute_tree(then["recipe"]))  # before 0.6 places were recorded as typed
    found: dict[str, Any] = json.loads(json.dumps(now))
    for record in (then, found):
        for name in (QUANTIZED, FILES):  # they have checks of their own
            record.pop(name, None)
        record["versions"].pop("nybble", None)
    changes = _differences(then, found, "")
    if changes:
        raise RunError(
            "the run cannot be resumed, because these changed since it began:\n"
            + "\n".join(f"  - {change}" for change in changes),
            where=str(run.folder / "start.json"),
            fix="undo these changes, or start a new run: nybble train -c RUN/recipe.yaml out=ANOTHER",
        )


def write_text(file: pathlib.Path, text: str) -> None:
    """Write a file so that it is there whole or as it was before."""
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(file, _as_json(value, 2) + "\n")


def write_lines(file: pathlib.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one line of JSON for each, atomically."""
    write_text(file, "".join(_as_json(line) + "\n" for line in lines))


def append_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Add one line; a line cut off by a crash is dropped when the run is resumed."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_as_json(value) + "\n")


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the options that it is too old to know."""
    sections = Recipe().model_dump(exclude={"out"})
    return {
        name: {**default, **recipe.get(name, {})} if isinstance(default, dict) else recipe.get(name, default)
        for name, default in sections.items()
    }


def _differences(then: Any, now: Any, place: str) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for key in keys for d in _differences(then.get(key), now.get(key), f"{place}.{key}".lstrip("."))]
    return [] if then == now else [f"{place.removeprefix('recipe.')}: {then!r} -> {now!r}"]


def _as_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is read best; a file's name that is not UTF-8 can only be written with escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    is_utf8 = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
    return text if is_utf8 else json.dumps(value, indent=indent)


def step_of(checkpoint: pathlib.Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])
