"""All that is known of a run before its base is loaded: `nybble data check` reports it, and `nybble train` goes on from it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nybble.data.batches import Collator
from nybble.data.sets.examine import Examined
from nybble.data.sets.prepare import Prepared, Refuse, examine_rows, examine_validation, raise_fault, sets_of
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
    """A run before its base is loaded; what is None was refused."""

    examined: Examined
    """The data, whether it can be trained on or not."""
    held_out: Examined | None
    """The rows of the file that data.validation names."""
    data: Prepared | None
    """Training and validation rows, whose batches have been looked at."""
    schedule: Schedule | None


def prepare_run(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None,
    cache: pathlib.Path,
    *,
    refuse: Refuse = raise_fault,
    progress: Callable[[Stage, int], None] = lambda *_: None,
    template: Template | None = None,
) -> Preparation:
    """Read, tokenise, check, split, arrange and inspect the data, and plan the steps.

    Args:
        recipe: of which data, model, train and engine are looked at.
        tokenizer: of the base model.
        config: of the base model; None where only its tokenizer is there.
        cache: folder for tokenised data.
        refuse: is given every fault, in the order in which training would find them.
        progress: called with what is being done and the number of rows so far.
        template: of a run that is resumed; else the recipe chooses it.

    Raises:
        DataError: there is nothing to look at.
        StorageError: the cache does not keep what is written to it.
    """
    are_unfit = False

    def refuse_rows(fault: NybbleError) -> None:
        nonlocal are_unfit
        are_unfit = True
        refuse(fault)

    def refuse_sets(fault: NybbleError) -> None:
        # Once the unfit rows are corrected they count again: that the others are too few is not a fault of its own.
        if not (are_unfit and isinstance(fault, TooFewRowsError)):
            refuse(fault)

    examined = examine_rows(recipe.data, tokenizer, cache, refuse_rows, partial(progress, "reading"), template)
    if config is not None:
        _check_length(recipe, config, refuse)
    held_out = examine_validation(
        recipe.data, examined.template, cache, refuse, partial(progress, "reading validation")
    )
    data = schedule = None
    if examined.counts.kept:
        data = _inspected_sets(recipe, examined, held_out, refuse_sets, partial(progress, "checking"))
    if data is not None:
        schedule = _schedule(recipe, data, refuse_sets)
    return Preparation(examined, held_out, data, schedule)


def _check_length(recipe: Recipe, config: PretrainedConfig, refuse: Refuse) -> None:
    try:
        check_length(config, recipe.data.max_length, recipe.model.rope_scaling)
    except ModelError as fault:
        refuse(fault)


def _inspected_sets(
    recipe: Recipe, examined: Examined, held_out: Examined | None, refuse: Refuse, progress: Progress
) -> Prepared | None:
    """Training and validation rows, whose batches are as they should be."""
    tokenizer = examined.template.tokenizer
    collate = Collator(tokenizer.pad_token_id, recipe.engine.fused)
    expected = Expected(examined.template, recipe.data.train_on)
    try:
        data = sets_of(examined, held_out, recipe.data, recipe.train.seed)
        for rows in (data.sample, data.validation):
            if rows is not None:
                inspect(rows, collate, expected, progress)
    except DataError as fault:
        refuse(fault)
        return None
    return data


def _schedule(recipe: Recipe, data: Prepared, refuse: Refuse) -> Schedule | None:
    try:
        return plan_steps(recipe.train, data.rows, data.validation is not None)
    except (DataError, RecipeError) as fault:
        refuse(fault)
        return None
