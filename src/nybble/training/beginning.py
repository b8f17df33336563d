"""What comes before a run trains, and holds until it ends: locations that can be written, the lock, its folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from accelerate import PartialState

from nybble.data.text.saved_template import save_template
from nybble.distributed.environment import environment_restored
from nybble.distributed.launcher import rank
from nybble.errors import ModelError, RecipeError, RunError
from nybble.files.atomic import no_empty_folders, run_lock
from nybble.files.disk_errors import explained_disk_errors
from nybble.files.outputs import check_run_and_cache
from nybble.model.base.bits import TrainedBase, trained_base
from nybble.model.base.checkpoint import Checkpoint, fingerprint
from nybble.recipe import Recipe
from nybble.run.folder import Run, check_room, create_run
from nybble.run.identity import check_unchanged
from nybble.run.start import start_record
from nybble.training.checkpoints import Resumption
from nybble.training.preparation import TrainingSetup


@contextlib.contextmanager
def run_guarded(recipe: Recipe, folder: pathlib.Path, cache: pathlib.Path) -> Iterator[contextlib.ExitStack]:
    """Locations are tried before anything is loaded; what the disk lacks later is one message, and the process's environment is
    afterwards what it was.

    What is entered into the stack, the run's lock, is held until the end.
    """
    check_run_and_cache(folder, cache)
    with (
        explained_disk_errors(folder, cache),
        no_empty_folders(folder),
        environment_restored(),
        contextlib.ExitStack() as stack,
    ):
        yield stack


def lock_run(stack: contextlib.ExitStack, run: Run, doing: str) -> None:
    """Hold the lock of a run, of several processes in the first."""
    if not rank():
        stack.enter_context(run_lock(run.folder, doing))


def refuse_finished(run: Run) -> None:
    """Raise RunError where there is nothing to resume."""
    if run.is_bare_adapter or run.adapter.exists():
        raise RunError(
            f"{run.folder} is finished: there is nothing to resume",
            fix=f"nybble chat {run.folder}, or continue from it: nybble train MODEL DATA adapter={run.adapter}",
        )


def refuse_moved_base(run: Run) -> None:
    """Raise ModelError where the folder with the base of a run to be resumed is gone."""
    base = run.recipe.model.path
    if os.path.isabs(base) and not os.path.exists(base):
        raise ModelError(
            f"the base of {run.folder} is missing: there is no folder {base}",
            fix="move it back, or put a link there, ln -s NEW OLD: a run can be resumed only with its own base",
        )


def refuse_missing_benchmarks(recipe: Recipe) -> None:
    """Raise RecipeError where the recipe names benchmarks that nothing can run."""
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


def open_run_folder(folder: pathlib.Path, setup: TrainingSetup, resumed: Resumption | None, state: PartialState) -> Run:
    """Make the folder of a new run, or check that nothing changed since the run that is resumed was started."""
    start = start_record(setup.recipe, setup.data.fingerprint, setup.base.fingerprint, setup.base.bits)
    check_room(folder, setup.trained_parameters, setup.recipe.train.keep_checkpoints)
    if resumed is not None:
        check_unchanged(resumed.run, start)
    elif state.is_main_process:
        with create_run(folder, setup.recipe, start) as beginning:
            own, setup.tokenizer.chat_template = setup.tokenizer.chat_template, setup.data.template.source
            setup.tokenizer.save_pretrained(beginning / "tokenizer")
            setup.tokenizer.chat_template = own
            save_template(setup.data.template, beginning / "template.json")
    state.wait_for_everyone()
    return Run(folder, setup.recipe)
