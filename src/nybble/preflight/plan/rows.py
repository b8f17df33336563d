"""What the data says of a run's memory and time: its rows' lengths, tokens and steps."""

from __future__ import annotations

import functools
import pathlib

import numpy

from nybble.data.order import GroupedByLength, lengths_of
from nybble.data.sets.prepare import Prepared
from nybble.errors import ModelError
from nybble.model.base.checkpoint import find_checkpoint
from nybble.model.base.load import load_config
from nybble.model.tokenizer.load import load_tokenizer
from nybble.plan.known_models import known_model
from nybble.plan.placing import Rows
from nybble.plan.schedule import Schedule
from nybble.preflight.plan.make import RowFacts
from nybble.preflight.preparation import prepare_run
from nybble.recipe import Recipe


def read_rows(recipe: Recipe, cache: pathlib.Path) -> RowFacts:
    """Read and tokenise the data as `nybble train` will; the result is cached for it.

    Raises:
        ModelError: the base has no tokenizer here.
        DataError: the data cannot be trained on.
    """
    path = recipe.model.path
    if known_model(path) is not None and "/" not in path and not pathlib.Path(path).exists():
        raise ModelError(
            f"{recipe.model.path} names sizes that are built in, but DATA is counted in tokens of the base's own tokenizer",
            fix="name the base by its folder or Hub id, or leave DATA out",
        )
    checkpoint = find_checkpoint(recipe.model.path, recipe.model.revision, weights=False)
    config = load_config(checkpoint, recipe.model.rope_scaling)
    prepared = prepare_run(recipe, load_tokenizer(checkpoint.folder), config, cache)
    assert prepared.data is not None, "faults were raised"
    assert prepared.schedule is not None, "faults were raised"
    return row_facts(recipe, prepared.data, prepared.schedule)


def row_facts(recipe: Recipe, data: Prepared, schedule: Schedule) -> RowFacts:
    """What prepared data says; of a stream, its first rows say how many tokens there are, but not how long one may be."""
    train, lengths = recipe.train, lengths_of(data.sample)
    step = train.micro_batch * train.accumulation * train.processes
    tokens = int(lengths.mean() * step * schedule.steps)
    typical = round(float((lengths.astype(float) ** 2).sum() / max(1, lengths.sum())))
    if recipe.data.streaming:
        return RowFacts(Rows(), step * schedule.steps, schedule.steps, tokens, typical)
    ordered = lengths[list(GroupedByLength(lengths, step, train.seed))]

    @functools.cache
    def largest(size: int) -> int:
        whole = numpy.concatenate([ordered, numpy.zeros(-len(ordered) % size, ordered.dtype)])
        return int(whole.reshape(-1, size).sum(axis=1).max(initial=0))

    return RowFacts(Rows(int(lengths.max()), largest), len(lengths), schedule.steps, tokens, typical)
