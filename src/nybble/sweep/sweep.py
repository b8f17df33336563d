"""A sweep, as numbered steps: trials that train one after the other on one base, each an ordinary run."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import time
from collections.abc import Iterator

from rich.console import Console

from nybble.errors import DataError, DeviceError, EngineError, ModelError, RecipeError, TrainingError
from nybble.evaluate.scores import Benchmarks
from nybble.files.atomic import run_lock
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.outputs import check_run_and_cache
from nybble.recipe import Recipe, absolute_paths
from nybble.run.folder import Run
from nybble.sweep.report import print_table, trial_line, write_report
from nybble.sweep.request import SweepRequest, trial_folder
from nybble.sweep.study import OngoingTrial, SweepStudy, TrialResult, best, explained_study_errors
from nybble.terminal import tell
from nybble.training.shared_parts import SharedParts, free_memory
from nybble.training.train import train

FAILURES = (TrainingError, RecipeError, EngineError, ModelError, DataError, DeviceError)
"""What ends a trial but not the sweep: it may follow from the settings. Before any trial has trained, only the first does."""
HOPELESS = 3  # failed trials before any has ended well: what is wrong is not the settings


def sweep(
    request: SweepRequest, console: Console, cache: pathlib.Path, benchmarks: Benchmarks | None = None
) -> pathlib.Path:
    """Run the trials of a sweep that have not run yet; returns its folder.

    Args:
        request: what was asked for.
        console: where progress is shown.
        cache: folder of quantised bases and tokenised data.
        benchmarks: as for `nybble.training.train.train`.

    Raises:
        NybbleError: something is wrong with recipe, data, model or machine, whatever the settings.
        KeyboardInterrupt: after Ctrl-C; the same command continues the sweep.
    """
    folder = request.folder
    check_run_and_cache(folder, cache)
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    with explained_disk_errors(folder, cache), run_lock(folder, "swept"), _opened(request) as study:
        # 1. What a sweep that was killed or interrupted left.
        for number in study.retry_killed():
            shutil.rmtree(trial_folder(folder, number), ignore_errors=True)
            tell(console, f"trial {number:03} was interrupted: its settings are tried again")
        # 2. The recipe's own values, where they lie in the space: what is found is not worse.
        study.start_with(request.searched.own)
        # 3. The trials; a finite space has no more than it has combinations.
        parts = SharedParts()
        wanted = request.wanted
        if wanted < request.trials:
            tell(console, f"the space has {wanted} combinations, so there are {wanted} trials, not {request.trials}")
        while (ended := len([each for each in study.results() if each.outcome != "killed"])) < wanted:
            trial = study.ask()
            tell(console, trial_line(trial.number, trial.settings, f"{ended + 1} of {wanted}"))
            result = _run_trial(request, study, trial, parts, console, cache, benchmarks)
            _prune(folder, study)
            write_report(folder, request, study.results(), study.importance())
            if result.outcome == "failed":
                _refuse_hopeless(study)
        # 4. The result.
        write_report(folder, request, study.results(), study.importance())
        print_table(request, study.results(), console)
    return folder


@contextlib.contextmanager
def _opened(request: SweepRequest) -> Iterator[SweepStudy]:
    common = request.recipe.model_dump(mode="json", exclude={"out"})
    seed = request.recipe.train.seed
    study = SweepStudy(request.folder, request.searched.space, common, request.trials, seed)
    try:
        with explained_study_errors(request.folder):
            yield study
    finally:
        study.close()


def _run_trial(
    request: SweepRequest, study: SweepStudy, trial: OngoingTrial, parts: SharedParts, console: Console,
    cache: pathlib.Path, benchmarks: Benchmarks | None,
) -> TrialResult:  # fmt: skip
    """Train a trial. The first prints what it does, as `nybble train`; the others show only how far they are."""
    started, loss, why = time.time(), None, ""
    quiet = Console(quiet=True) if parts.loads else console
    with console.status("") as status:

        def watch(evaluation: int, held_out: float, is_last: bool) -> bool:
            status.update(f"trial {trial.number}: held-out loss {held_out:.4f} at evaluation {evaluation}")
            return trial.watch(evaluation, held_out, is_last)

        status.update(f"trial {trial.number} is trained")
        if not parts.loads:
            status.stop()  # the run has a progress bar of its own
        try:
            recipe = _trial_recipe(request, trial)
            run = train(recipe, console=quiet, cache=cache, benchmarks=benchmarks, parts=parts, watch=watch)
            loss = held_out_loss(run)
        except FAILURES as error:
            if not (isinstance(error, TrainingError) or study.results()):
                raise
            why = error.what
    free_memory()  # what the error held
    result = study.tell(trial, loss, why, time.time() - started)
    tell(console, trial_line(trial.number, {}, _ending(result)), "yellow" if result.outcome == "failed" else "")
    return result


def _trial_recipe(request: SweepRequest, trial: OngoingTrial) -> Recipe:
    recipe = absolute_paths(request.searched.recipe(trial.settings))
    tracker = recipe.tracker.model_copy(update={"group": recipe.tracker.group or request.folder.name})
    return recipe.model_copy(update={"out": str(trial_folder(request.folder, trial.number)), "tracker": tracker})


def held_out_loss(run: Run) -> float:
    """Loss of the adapter that a run kept, on its validation rows."""
    summary = run.summary()
    assert summary is not None, "a run that has ended has a summary"
    assert summary.validation_loss is not None, "a recipe without validation rows is refused"
    return summary.validation_loss.kept


def _ending(result: TrialResult) -> str:
    if result.outcome == "failed":
        return f"failed: {result.why}"
    early = ", ended early: worse than the median" if result.outcome == "pruned" else ""
    return f"held-out loss {result.loss:.4f}{early}  ({result.seconds:,.0f} s)"


def _prune(folder: pathlib.Path, study: SweepStudy) -> None:
    """Remove the checkpoints of all runs that have ended but the best; their adapters stay."""
    results = study.results()
    kept = best(results)
    for each in results:
        if each.outcome in ("complete", "pruned") and each != kept:
            for checkpoint in Run(trial_folder(folder, each.number), Recipe()).numbered_checkpoints():
                shutil.rmtree(checkpoint, ignore_errors=True)


def _refuse_hopeless(study: SweepStudy) -> None:
    results = study.results()
    failed = [each for each in results if each.outcome == "failed"]
    if len(failed) >= HOPELESS and best(results) is None:
        raise TrainingError(
            f"the first {len(failed)} trials failed; the last because {failed[-1].why}",
            fix="lower rates, or nybble train with one of the settings to see all that it says",
        )
