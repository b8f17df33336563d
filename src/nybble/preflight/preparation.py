"""All that is known of a run before its base is loaded: `nybble data check` reports it, and `nybble train` continues from it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.data.batches import Collator
from nybble.data.judged_batches import collator_for
from nybble.data.judged_xray import ExpectedJudged, inspect_judged
from nybble.data.rows.formats import TARGETS
from nybble.data.sets.examine import Examined
from nybble.data.sets.prepare import OnFault, Prepared, examine_rows, examine_validation, make_sets, raise_fault
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Progress
from nybble.data.xray import Expected, inspect
from nybble.errors import DataError, ModelError, NybbleError, RecipeError, TooFewRowsError
from nybble.model.base.checkpoint import check_length
from nybble.plan.schedule import Schedule, plan_steps
from nybble.recipe import Recipe

Stage = Literal["reading", "reading validation", "checking"]


@dataclass(frozen=True)
class Preparation:
    """A run before its base is loaded."""

    examined: Examined
    """The data, whether it can be trained on or not."""
    held_out: Examined | None
    """The rows of the file that data.validation names; None if it names none, or if the file was refused."""
    data: Prepared | None
    """Training and validation rows, whose batches have been inspected; None if they were refused."""
    schedule: Schedule | None
    """None if the data or the schedule was refused."""


def prepare_run(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    cache: pathlib.Path,
    *,
    on_fault: OnFault = raise_fault,
    progress: Callable[[Stage, int], None] = lambda *_: None,
    template: Template | None = None,
) -> Preparation:
    """Read, tokenise, check, split, arrange and inspect the data, and plan the steps.

    Args:
        recipe: its sections data, model, train and engine are used.
        tokenizer: the base model's.
        config: the base model's; None if only the tokenizer is available.
        cache: folder for tokenised data.
        on_fault: called with every fault, in the order in which training would find them.
        progress: called with the current stage and the number of rows so far.
        template: that of the run being resumed; else the recipe chooses it.

    Raises:
        DataError: there is no data to examine.
        StorageError: the cache does not keep what is written to it.
    """
    rows_are_faulty = False

    def on_row_fault(fault: NybbleError) -> None:
        nonlocal rows_are_faulty
        rows_are_faulty = True
        on_fault(fault)

    def on_set_fault(fault: NybbleError) -> None:
        # Faulty rows count again once they are corrected, so it is not a separate fault that the others are too few.
        if not (rows_are_faulty and isinstance(fault, TooFewRowsError)):
            on_fault(fault)

    target = TARGETS[recipe.train.objective]
    examined = examine_rows(recipe.data, tokenizer, cache, on_row_fault, partial(progress, "reading"), template, target)
    if config is not None:
        _check_length(recipe, config, on_fault)
    held_out = examine_validation(
        recipe.data, examined.template, cache, on_fault, partial(progress, "reading validation"), target
    )
    data = schedule = None
    if examined.counts.kept:
        data = _inspected_sets(recipe, examined, held_out, on_set_fault, partial(progress, "checking"))
    if data is not None:
        schedule = _schedule(recipe, data, on_set_fault)
    return Preparation(examined, held_out, data, schedule)


def _check_length(recipe: Recipe, config: PretrainedConfig, on_fault: OnFault) -> None:
    try:
        check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    except ModelError as fault:
        on_fault(fault)


def _inspected_sets(
    recipe: Recipe, examined: Examined, held_out: Examined | None, on_fault: OnFault, progress: Progress
) -> Prepared | None:
    """Training and validation rows whose batches have passed inspection; None if they have not."""
    tokenizer = examined.template.tokenizer
    flatten = recipe.engine.fused
    collate = collator_for(recipe.train.objective, tokenizer.pad_token_id, flatten=flatten, shares_prompts=flatten)
    expected = Expected(examined.template, recipe.data.train_on)
    judged = ExpectedJudged(examined.template)
    try:
        data = make_sets(examined, held_out, recipe.data, recipe.train.seed)
        for rows in (data.sample, data.validation):
            if rows is not None and isinstance(collate, Collator):
                inspect(rows, collate, expected, progress)
            elif rows is not None:
                inspect_judged(rows, collate, judged, progress)
    except DataError as fault:
        on_fault(fault)
        return None
    return data


def _schedule(recipe: Recipe, data: Prepared, on_fault: OnFault) -> Schedule | None:
    try:
        return plan_steps(recipe.train, data.rows, data.validation is not None)
    except (DataError, RecipeError) as fault:
        on_fault(fault)
        return None
