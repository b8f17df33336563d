"""A run's checkpoints: marked while they are written, verified before use, and never removed if they may be the only copy.

checkpoint-N/WRITING     exists while the checkpoint is saved: without COMPLETE, that was interrupted, and it may be removed
checkpoint-N/COMPLETE    exists from then on, with the digest of each file (`nybble.run.marks`)
set-aside-checkpoint-N   was damaged or not marked when the run was resumed from an older one
.unfinished-...          exists for a moment, while a checkpoint is created, tried or removed
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import ModelError, RunError
from nybble.files.digests import faults, unreadable
from nybble.files.reading import RESTORE, Shape, read_shape
from nybble.files.writing import write_json
from nybble.model.base.files import check_whole
from nybble.run.folder import Run, step_of
from nybble.run.log import check_logs, cut_logs
from nybble.run.marks import COMPLETE, described, read_mark

WRITING = "WRITING"
ASIDE, HIDDEN, TRIED = "set-aside-", ".unfinished-", ".unfinished-trial"
# What Trainer resumes from; each of several processes has its own state of random numbers.
NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")
LOADED = (".safetensors", ".pt", ".pth", ".bin", ".json")  # endings of files that Trainer and PEFT look for
ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error)


class SavedState(Shape):
    """The fields of trainer_state.json that are read."""

    global_step: int
    best_global_step: int | None = None
    log_history: list[dict[str, Any]]


@dataclass(frozen=True)
class Resumption:
    """An interrupted run, and the checkpoint from which it is resumed."""

    run: Run
    checkpoint: pathlib.Path | None
    """None if the run starts over."""
    skipped: Mapping[pathlib.Path, str]
    """Newer checkpoints, and what is wrong with each."""

    @property
    def step(self) -> int:
        """The last step that is done; -1 if not even the evaluation before the first step is."""
        return step_of(self.checkpoint) if self.checkpoint is not None else -1


def resumption(run: Run) -> Resumption:
    """Find the newest complete checkpoint whose best checkpoint is complete too; nothing is changed.

    Raises:
        RunError: there are checkpoints but none is complete; the path of their folder is not a folder; or the log of the
            steps before is damaged.
    """
    if os.path.lexists(run.checkpoints) and not run.checkpoints.is_dir():
        path = shlex.quote(str(run.checkpoints))
        fix = f"copy the folder there; or move this away, and the run starts over: mv {path} ELSEWHERE"
        raise RunError("checkpoints is not a folder", where=str(run.checkpoints), fix=fix)
    skipped: dict[pathlib.Path, str] = {}
    for folder in run.numbered_checkpoints():
        if _is_unfinished(folder):
            continue
        wrong = faults_of(folder) or _faults_of_best(run, folder)
        if not wrong:
            result = Resumption(run, folder, skipped)
            check_logs(run, result.step)
            return result
        skipped[folder] = wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
    if skipped:
        raise _no_checkpoint(run, skipped)
    return Resumption(run, None, skipped)


def _no_checkpoint(run: Run, skipped: Mapping[pathlib.Path, str]) -> RunError:
    listed = "\n".join(f"  - {folder.name}: {wrong}" for folder, wrong in skipped.items())
    path = shlex.quote(str(run.checkpoints))
    fix = f"copy a complete checkpoint into {path}; or move them away, and the run starts over: mv {path} ELSEWHERE"
    unmarked = next((folder for folder in skipped if not (folder / COMPLETE).exists() and not _missing(folder)), None)
    if unmarked is not None:  # 0.5.1 left COMPLETE empty
        mark = shlex.quote(str(unmarked / COMPLETE))
        fix += f"; or, if its files are complete and a copy only lost the empty {COMPLETE}: touch {mark}"
    return RunError(f"no checkpoint can be resumed from:\n{listed}", where=str(run.checkpoints), fix=fix)


def faults_of(checkpoint: pathlib.Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence per fault.

    It is compared with its COMPLETE; if that lists no files, the formats of its files are checked.
    """
    try:
        if not (checkpoint / COMPLETE).exists():
            missing = ", ".join([COMPLETE, *_missing(checkpoint)])
            return [f"it is not marked as complete (there is no {missing})"]
        files = read_mark(checkpoint).get("files")
        wrong = _changed(checkpoint, files) if files is not None else []
        wrong = wrong or [f"there is no {pattern}" for pattern in _missing(checkpoint)]
        wrong = wrong or (_corrupt(checkpoint) if files is None else [])
        return wrong or _wrong_step(checkpoint)
    except RunError as error:
        return [error.what]
    except OSError as error:
        return [unreadable(error)]


def _changed(checkpoint: pathlib.Path, files: Mapping[str, Any]) -> list[str]:
    wrong = faults(checkpoint, files)
    foreign = _foreign(checkpoint, files)
    return wrong + [f"{name} was not written with it" for name in foreign if name.endswith(LOADED)]


def _foreign(checkpoint: pathlib.Path, files: Mapping[str, Any]) -> list[str]:
    present = [file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if not file.is_dir()]
    return sorted(set(present) - {COMPLETE, WRITING, *files})


def _missing(checkpoint: pathlib.Path) -> list[str]:
    return [pattern for pattern in NEEDED if not any(checkpoint.glob(pattern))]


def _corrupt(checkpoint: pathlib.Path) -> list[str]:
    files = sorted(file for pattern in NEEDED for file in checkpoint.glob(pattern))
    return [f"{file.name} is cut off or garbled" for file in files if not _is_whole(file)]


def _is_whole(file: pathlib.Path) -> bool:
    """Whether a file of an older version's checkpoint is valid for its format; torch's files have a checksum of each part."""
    try:
        if not file.is_file():
            return False
        if file.suffix == ".json":
            _state(file.parent)
        elif file.suffix == ".safetensors":
            check_whole(file)
        else:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
    except (ModelError, RunError, *ZIP_FAULTS):
        return False
    return True


def _state(checkpoint: pathlib.Path) -> SavedState:
    return read_shape(checkpoint / "trainer_state.json", SavedState, RunError, RESTORE, largest=None)


def _wrong_step(checkpoint: pathlib.Path) -> list[str]:
    step = _state(checkpoint).global_step
    return [] if step == step_of(checkpoint) else [f"it is of step {step}, whatever its name says"]


def _faults_of_best(run: Run, checkpoint: pathlib.Path) -> list[str]:
    """What is wrong with the best checkpoint so far, whose adapter the run will end with unless a later one is better."""
    folder = best_before(run, checkpoint)
    if folder is None:
        return []
    if not folder.is_dir():
        return [f"the best checkpoint before it is missing: {folder.name}"]
    return [f"the best checkpoint before it, {folder.name}, is damaged: {wrong}" for wrong in faults_of(folder)]


def best_before(run: Run, checkpoint: pathlib.Path) -> pathlib.Path | None:
    """The best checkpoint before this one, which need not exist; None where the run does not keep it, or this one is the best."""
    best = _state(checkpoint).best_global_step
    is_another = run.recipe.train.keep_best and best and best != step_of(checkpoint)
    return run.checkpoints / f"checkpoint-{best}" if is_another else None


def processes_of(checkpoint: pathlib.Path) -> int:
    """How many processes wrote a checkpoint: each has its own state of random numbers."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def check_best(checkpoint: pathlib.Path) -> None:
    """Verify the checkpoint whose adapter a run ends with.

    Raises:
        RunError: it was damaged since it was saved.
    """
    if wrong := faults_of(checkpoint):
        raise RunError(
            f"{checkpoint.name}, whose validation loss is the best, was damaged while the run went on: {wrong[0]}",
            where=str(checkpoint),
            fix=f"nybble train --resume {checkpoint.parent.parent}: it resumes from a checkpoint before that one",
        )


def prepare_resumption(resumed: Resumption) -> list[str]:
    """Before a run is resumed, drop the lines of later steps, remove unfinished checkpoints, and set damaged ones aside.

    Returns:
        Notices for the user.
    """
    run = resumed.run
    remove_unfinished(run)
    notices = [
        f"{folder.name}: {wrong}; it is now {_set_aside(folder).name}" for folder, wrong in resumed.skipped.items()
    ]
    logged = {line.step for line in cut_logs(run, resumed.step) if line.tokens is not None}
    lost = max(resumed.step, 0) - len(logged)
    if lost > 0:
        what = f"{lost:,} of {resumed.step:,} steps"
        notices.append(
            f"metrics.jsonl has no line for {what}: the summary counts neither their tokens nor their seconds"
        )
    return notices


def resumed_files(run: Run) -> list[pathlib.Path]:
    """The files that a process needs to resume a run, as on a machine without its folder.

    Raises:
        RunError: there is nothing to resume from.
    """
    checkpoint = resumption(run).checkpoint
    folders = [run.folder / "tokenizer"]
    if checkpoint is not None:
        folders += [checkpoint, *filter(None, [best_before(run, checkpoint)])]
    files = [run.folder / name for name in ("recipe.yaml", "start.json", "template.json")]
    files += [file for folder in folders for file in sorted(folder.rglob("*"))]
    return [file for file in files if file.is_file()]


def start_checkpoint(checkpoint: pathlib.Path) -> None:
    """Create a checkpoint's folder; an existing one is set aside."""
    if os.path.lexists(checkpoint):
        _set_aside(checkpoint)
    hidden = _unused(checkpoint.with_name(HIDDEN + checkpoint.name))  # the checkpoint never exists without its mark
    hidden.mkdir(parents=True)
    (hidden / WRITING).write_text(f"This checkpoint is being written. It is complete once {COMPLETE} is here.\n")
    hidden.rename(checkpoint)


def mark_complete(checkpoint: pathlib.Path, used: Mapping[str, float]) -> None:
    """Mark a checkpoint as complete, once all of its files are written.

    Args:
        checkpoint: its folder.
        used: what the run has used so far: `seconds`, and `peak_memory` in bytes.
    """
    write_json(checkpoint / COMPLETE, {**used, "files": described(checkpoint, {WRITING})})
    (checkpoint / WRITING).unlink(missing_ok=True)


def remove_old(run: Run, best: str | None) -> None:
    """Remove the complete checkpoints except the newest, as many as the recipe keeps, and the best; one that also contains
    other files stays.

    Args:
        run: the run.
        best: the path of the best one when it was recorded; only its name counts.
    """
    whole = [folder for folder in run.numbered_checkpoints() if (folder / COMPLETE).exists()]
    best_name = pathlib.PurePath(best).name if best else None
    for folder in whole[run.recipe.train.keep_checkpoints :]:
        if folder.name != best_name and _is_own(folder):
            _remove(folder)


def _is_own(checkpoint: pathlib.Path) -> bool:
    try:
        files = read_mark(checkpoint).get("files")
    except RunError:  # it is unknown what was written
        return False
    return files is None or not _foreign(checkpoint, files)


def remove_unfinished(run: Run) -> None:
    """Remove checkpoints whose writing or removal was interrupted: the run cannot resume from them, and they take disk space.

    A checkpoint interrupted between its two marks is complete; its first mark is removed, so that it does not seem unfinished
    if a copy ever loses the second.
    """
    for folder in run.numbered_checkpoints():
        if _is_unfinished(folder):
            _remove(folder)
        elif (folder / WRITING).exists():
            with contextlib.suppress(OSError):
                (folder / WRITING).unlink()
    for pattern in (f"{HIDDEN}checkpoint-*", TRIED):
        for folder in run.checkpoints.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def discarded_folder(checkpoints: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside the checkpoints to try a save in; it is removed afterwards, or by `remove_unfinished` after a kill."""
    folder = checkpoints / TRIED
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_unfinished(folder: pathlib.Path) -> bool:
    return (folder / WRITING).exists() and not (folder / COMPLETE).exists()


def _remove(folder: pathlib.Path) -> None:
    """Rename it first, so that a kill leaves no partial checkpoint; a link is left alone, since its target is not the run's."""
    if not folder.is_symlink():
        hidden = _unused(folder.with_name(HIDDEN + folder.name))
        with contextlib.suppress(OSError):  # what cannot be removed only takes disk space
            shutil.rmtree(folder.rename(hidden))


def _set_aside(folder: pathlib.Path) -> pathlib.Path:
    return folder.rename(_unused(folder.with_name(ASIDE + folder.name)))


def _unused(path: pathlib.Path) -> pathlib.Path:
    """The path, with a number if it exists."""
    names: Iterator[pathlib.Path] = (path.with_name(f"{path.name}-{number}") for number in range(2, 1_000_000))
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))
