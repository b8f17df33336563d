"""What is done before a run trains, and holds until it ends: paths that can be written, the lock, the run folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from accelerate import PartialState
from rich.console import Console

from nybble.data.text.saved_template import save_template
from nybble.distributed.environment import environment_restored
from nybble.distributed.group import explained_lost_process
from nybble.distributed.launcher import placement, rank
from nybble.distributed.sending import folder_at_hand
from nybble.errors import ModelError, RecipeError, RunError
from nybble.files.atomic import no_empty_folders, refuse_busy, run_lock
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.outputs import check_run_and_cache
from nybble.files.paths import check_cache
from nybble.model.base.bits import TrainedBase, trained_base
from nybble.model.base.checkpoint import Checkpoint, fingerprint
from nybble.recipe import Recipe
from nybble.run.folder import Run, check_disk_space, create_run, open_run
from nybble.run.identity import check_agreement, check_unchanged
from nybble.run.rate import FoundRate
from nybble.run.split import record_split
from nybble.run.start import start_record
from nybble.terminal import tell
from nybble.training.checkpoints import Resumption, resumed_files
from nybble.training.preparation import TrainingSetup
from nybble.training.rate_plot import write_search


@contextlib.contextmanager
def run_guarded(recipe: Recipe, folder: pathlib.Path, cache: pathlib.Path) -> Iterator[contextlib.ExitStack]:
    """Check the paths before anything is loaded, turn later disk errors into one message, and restore the environment at the end.

    The contexts entered into the stack, such as the run's lock, last until the end.
    """
    check_writable_paths(folder, cache)
    with (
        explained_disk_errors(folder, cache),
        no_empty_folders(folder),
        environment_restored(),
        explained_lost_process(),
        contextlib.ExitStack() as stack,
    ):
        yield stack


def check_writable_paths(folder: pathlib.Path, cache: pathlib.Path) -> None:
    """Refuse a run folder or a cache that cannot be written; of several processes only the first one writes the folder, which the
    others' machines need not have."""
    if rank():
        check_cache(cache)
    else:
        check_run_and_cache(folder, cache)


def lock_run(stack: contextlib.ExitStack, run: Run, doing: str) -> None:
    """Hold the lock of a run; of several processes the first one holds it."""
    if not rank():
        stack.enter_context(run_lock(run.folder, doing))


def refuse_finished(run: Run) -> None:
    """Raise RunError if there is nothing to resume."""
    if run.is_bare_adapter or run.adapter.exists():
        raise RunError(
            f"{run.folder} is finished: there is nothing to resume",
            fix=f"nybble chat {run.folder}, or continue from it: nybble train MODEL DATA adapter={run.adapter}",
        )


def refuse_moved_base(run: Run) -> None:
    """Raise ModelError if the folder of the base of a run to be resumed is gone."""
    base = run.recipe.model.path
    if os.path.isabs(base) and not os.path.exists(base):
        raise ModelError(
            f"the base of {run.folder} is missing: there is no folder {base}",
            fix="move it back, or make a link, ln -s NEW OLD: a run can be resumed only with its own base",
        )


@contextlib.contextmanager
def run_at_hand(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder that this process resumes a run from: the run's, or a copy of what it needs where it does not see the first
    process's folder. All processes must call this before they open the run.

    Raises:
        NybbleError: the run cannot be resumed.
    """

    def choose() -> list[pathlib.Path]:
        run = open_run(folder)
        refuse_busy(folder)
        refuse_finished(run)
        return resumed_files(run)

    with explained_lost_process(), folder_at_hand(folder, choose, placement()) as found:
        yield found


def refuse_missing_benchmarks(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe names benchmarks but there is nothing to run them."""
    if recipe.train.eval_tasks:
        raise RecipeError(
            f"train.eval_tasks={recipe.train.eval_tasks}: there is no benchmark harness to run them",
            fix="train(recipe, benchmarks=nybble.evaluate.harness.Harness(...)), or nybble train on the command line",
        )


def base_of_resumed(resumed: Resumption | None, checkpoint: Checkpoint, cache: pathlib.Path) -> TrainedBase | None:
    """The base in the record of a resumed run; None if the weights have changed, which `check_unchanged` reports later."""
    if resumed is None:
        return None
    now, trained = fingerprint(checkpoint, cache, prove=True), trained_base(resumed.run)
    return trained if trained is not None and trained.fingerprint == now else None


def open_run_folder(
    folder: pathlib.Path, setup: TrainingSetup, resumed: Resumption | None, state: PartialState, console: Console,
    found: FoundRate | None,
) -> Run:  # fmt: skip
    """Create the folder of a new run, or check that nothing has changed since the resumed run was started.

    `found`: how its learning rate was found; None if the recipe names it.

    Raises:
        RunError: something has changed, or another process has found other data, another base or other versions.
    """
    start = start_record(setup.recipe, setup.data.fingerprint, setup.base.fingerprint, setup.base.bits)
    check_agreement(start)
    if state.is_main_process:
        check_disk_space(folder, setup.trained_parameters, setup.recipe.train.keep_checkpoints)
    if resumed is not None:
        check_unchanged(resumed.run, start)
        if state.is_main_process and (change := record_split(resumed.run)):
            tell(console, f"processes {change}")
    elif state.is_main_process:
        with create_run(folder, setup.recipe, start) as temporary:
            original, setup.tokenizer.chat_template = setup.tokenizer.chat_template, setup.data.template.source
            setup.tokenizer.save_pretrained(temporary / "tokenizer")
            setup.tokenizer.chat_template = original
            save_template(setup.data.template, temporary / "template.json")
            if found is not None:
                write_search(found, temporary)
    state.wait_for_everyone()
    return Run(folder, setup.recipe)
