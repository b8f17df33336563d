"""A run that is resumed on another number of processes: its steps keep their rows, differently split."""

from __future__ import annotations

from nybble.errors import RecipeError, RunError
from nybble.plan.schedule import split_among
from nybble.recipe import TrainOptions, load_recipe
from nybble.run.folder import Run, change_recipe, open_run
from nybble.run.start import ACCUMULATION, MICRO_BATCH, PROCESSES


def on_processes(run: Run, processes: int | None) -> Run:
    """The run on so many processes, with the same rows in each step; nothing is written. The micro batch does not grow, except to
    what it was on as many processes as the run was started with.

    Args:
        run: the run.
        processes: None for as many as it has.

    Raises:
        RunError: the rows of a step cannot be divided among them.
        RecipeError: an option of the run does not work with so many.
    """
    train = run.recipe.train
    if processes is None or processes == train.processes or run.is_bare_adapter:
        return run
    split = _first_split(run, processes) or split_among(train, processes)
    if split is None:
        rows = train.micro_batch * train.accumulation * train.processes
        possible = [str(count) for count in range(1, rows + 1) if rows % count == 0]
        raise RunError(
            f"a step of this run has {rows} rows, which cannot be divided among {processes} processes",
            where=f"{run.folder / 'recipe.yaml'} (micro_batch {train.micro_batch} x accumulation {train.accumulation} "
            f"x processes {train.processes})",
            fix=f"nybble train --resume {run.folder} --processes N, where N is one of {', '.join(possible)}",
        )
    changes = {PROCESSES: processes, MICRO_BATCH: split[0], ACCUMULATION: split[1]}
    try:
        load_recipe(run.folder / "recipe.yaml", [f"train.{name}={value}" for name, value in changes.items()])
    except RecipeError as error:
        fix = f"nybble train --resume {run.folder}"
        raise RecipeError(error.what, where=f"--processes {processes}", fix=fix) from error
    return Run(run.folder, run.recipe.model_copy(update={"train": train.model_copy(update=changes)}))


def _first_split(run: Run, processes: int) -> tuple[int, int] | None:
    """The split that the run was started with, if it was on so many processes and gives the same step: a smaller micro batch
    would look as if the first had not fitted."""
    if not (run.folder / "start.json").exists():
        return None
    now, first = run.recipe.train, run.start().recipe.train
    micro_batch, accumulation = (first.get(name) for name in (MICRO_BATCH, ACCUMULATION))
    if first.get(PROCESSES, 1) != processes or not isinstance(micro_batch, int) or not isinstance(accumulation, int):
        return None
    is_same = micro_batch * accumulation * processes == now.micro_batch * now.accumulation * now.processes
    return (micro_batch, accumulation) if is_same else None


def record_split(run: Run) -> str:
    """Write a run's split into its recipe.yaml if another one is recorded there; returns a sentence about it, or ""."""
    then, now = open_run(run.folder).recipe.train, run.recipe.train
    if then.processes == now.processes:
        return ""
    change_recipe(run, run.recipe)
    parts = [_change("micro batch", then, now, MICRO_BATCH), _change("accumulation", then, now, ACCUMULATION)]
    return f"{then.processes} -> {now.processes}: {', '.join(parts)} (the same step)"


def _change(name: str, then: TrainOptions, now: TrainOptions, option: str) -> str:
    before, after = getattr(then, option), getattr(now, option)
    return f"{name} {after}" if before == after else f"{name} {before} -> {after}"
