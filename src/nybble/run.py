"""The run folder: its layout, atomic writes, what a resumed run is held against, and how it is opened again.

RUN/recipe.yaml       every option, documented
RUN/start.json        fingerprints of recipe, data, base and versions, written before the first step
RUN/template.json     the chat template by name and text
RUN/tokenizer/        tokenizer with that template
RUN/checkpoints/      checkpoint-N, each whole once it holds a file COMPLETE, which says what the run had taken until then
RUN/metrics.jsonl     a line a step, and a line an evaluation
RUN/samples.jsonl     answers to validation prompts at each evaluation
RUN/adapter/          the PEFT adapter: its appearance means that training has ended
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
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nybble import __version__
from nybble.errors import ModelError, RunError
from nybble.places import check_disk, new_folder, replacing
from nybble.reading import read_object as read_object  # model and export know it by this place
from nybble.recipe import Recipe, absolute_paths, absolute_tree, dump_recipe, here, load_recipe

COMPLETE = "COMPLETE"
BYTES_A_PARAMETER = 12  # in a checkpoint: a trained parameter and AdamW's two moments, in float32
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
        file = self.folder / "summary.json"
        if self.is_bare_adapter or not file.exists():
            return ""
        return str(json.loads(file.read_text(encoding="utf-8"))["data"].get("system", ""))

    def latest_checkpoint(self) -> pathlib.Path | None:
        """The newest whole checkpoint."""
        whole = [file.parent for file in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        return max(whole, key=_step, default=None)

    def spent_until(self, checkpoint: pathlib.Path | None) -> dict[str, float]:
        """What the run had taken when a checkpoint was saved: `seconds`, and `peak_memory` in bytes."""
        text = (checkpoint / COMPLETE).read_text(encoding="utf-8") if checkpoint is not None else ""
        return {"seconds": 0.0, "peak_memory": 0, **(json.loads(text) if text else {})}

    def place_best(self) -> None:
        """Write into the newest checkpoint where the best one is now: Trainer records the path that it had, and forgets the
        best where it is not found, as after a move or from another folder."""
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return
        file = checkpoint / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["best_model_checkpoint"] is not None:
            best = self.checkpoints / pathlib.PurePath(state["best_model_checkpoint"]).name
            write_json(file, {**state, "best_model_checkpoint": str(best)})

    def drop_unfinished(self) -> None:
        """Remove checkpoints that were cut off: they cannot be resumed, and take the room that others need."""
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder, ignore_errors=True)

    def drop_after(self, checkpoint: pathlib.Path | None) -> None:
        """Forget what was begun after a checkpoint: cut-off checkpoints, and lines of later steps."""
        step = _step(checkpoint) if checkpoint is not None else 0
        for folder in self.checkpoints.glob("checkpoint-*"):
            if _step(folder) > step:
                shutil.rmtree(folder)
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self.folder / name
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= step and checkpoint]
            write_text(file, "".join(line + "\n" for line in kept))


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
            write_json(temporary / "start.json", start)
            (temporary / "checkpoints").mkdir()
            yield temporary
    except FileExistsError:
        refuse_existing(folder)
        raise


def refuse_existing(folder: pathlib.Path) -> None:
    """Raise RunError where a run stands already."""
    if folder.exists():
        raise RunError(
            f"{folder} exists already",
            fix=f"to resume it: nybble train --resume {folder}; for a new run: out=ANOTHER",
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
    needed = (keep + 2) * trained * BYTES_A_PARAMETER + trained * 4
    check_disk(folder, needed, "the run's folder", "free some space, or out=FOLDER on another disk")


def open_run(path: str | pathlib.Path, base: str | None = None) -> Run:
    """Open a run, or a PEFT adapter folder.

    Local places in its recipe are absolute, also those of runs before 0.6, which recorded them as typed: they are looked
    for from the current folder. A base that was a folder is a folder, even where it is gone: the Hub is not asked for it.

    Args:
        path: the folder.
        base: where the base model is now, if it moved.

    Raises:
        RunError: no run there.
        ModelError: an adapter whose configuration cannot be read.
    """
    folder = pathlib.Path(path)
    if (folder / "recipe.yaml").exists():
        recipe = absolute_paths(load_recipe(folder / "recipe.yaml"))
        if recorded_folder(folder):
            recipe = _on_base(recipe, here(recipe.model.path))
    elif (folder / "adapter_config.json").exists():
        recipe = _on_base(Recipe(), _base_of_adapter(folder))
    else:
        what = f"there is no folder {folder}" if not folder.exists() else f"{folder} is neither a run nor an adapter"
        raise RunError(f"{what} (no recipe.yaml, no adapter_config.json)", fix="ls runs/")
    if base is not None:
        recipe = absolute_paths(_on_base(recipe, base, revision=None))
    return Run(folder, recipe)


def _on_base(recipe: Recipe, base: str, **changes: str | None) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base, **changes})})


def recorded_folder(run: pathlib.Path) -> bool:
    """Whether a run's record says that its base was a folder: then it names the weights, and no commit of the Hub."""
    start = run / "start.json"
    return start.exists() and str(json.loads(start.read_text(encoding="utf-8")).get("base")).startswith("sha256:")


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


def start_record(recipe: Recipe, data: str, base: str) -> dict[str, Any]:
    """What a resumed run must find unchanged; the recipe's local places are absolute."""
    return {"recipe": recipe.model_dump(exclude={"out"}), "data": data, "base": base, "versions": versions()}


def check_unchanged(run: Run, now: Mapping[str, Any]) -> None:
    """Hold a run that is resumed against how it began, by whichever version of nybble.

    Raises:
        RunError: listing what changed, from what to what.
    """
    then = json.loads((run.folder / "start.json").read_text(encoding="utf-8"))
    then["recipe"] = _with_defaults(absolute_tree(then["recipe"]))  # before 0.6 places were recorded as typed
    now = json.loads(json.dumps(now))
    for record in (then, now):
        record["versions"].pop("nybble", None)
    changes = _differences(then, now, "")
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


def append_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Add one line; a line cut off by a crash is dropped when the run is resumed."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(_as_json(value) + "\n")


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl."""
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else []
    return [json.loads(line) for line in lines if _is_whole(line)]


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


def _is_whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def _step(folder: pathlib.Path) -> int:
    return int(folder.name.rsplit("-", 1)[-1])
