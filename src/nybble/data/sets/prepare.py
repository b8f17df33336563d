"""From a recipe's data section to training and validation sets: examine, refuse what is unfit, split, weigh, pack."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nybble.data.batches import PackedRows
from nybble.data.packing import best_fit
from nybble.data.sets.examine import Examined, examine, refuse_unfit
from nybble.data.sets.stream import StreamedRows
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Counts, Progress
from nybble.errors import TooFewRowsError
from nybble.recipe import DataOptions


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on."""

    train: Dataset | PackedRows | StreamedRows
    validation: Dataset | None
    template: Template
    counts: Counts
    fingerprint: str
    """SHA-256 over the source, tokenizer, template and lengths: equal means equal tokens."""
    cached: bool
    sample: Dataset | PackedRows
    """What of `train` can be looked at beforehand: all of it, or the examined beginning of a stream."""
    train_samples: int
    """Distinct conversations in `train`, however they are packed and weighted; of a stream those that were examined."""

    @property
    def rows(self) -> int | None:
        """Rows of an epoch; None of a stream."""
        return None if isinstance(self.train, StreamedRows) else len(self.train)


def prepare(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: pathlib.Path,
    progress: Progress = lambda _: None,
    template: Template | None = None,
) -> Prepared:
    """Turn the data a recipe names into token rows.

    Args:
        options: the recipe's data section.
        tokenizer: of the base model; its chat template is a candidate for the template.
        seed: of the split into training and validation rows.
        cache: folder for tokenised data.
        progress: called with the number of rows read so far.
        template: of a run whose rows are read again; else the options choose it.

    Raises:
        DataError: with the `file:line` of what is wrong.
    """
    examined = examine(options, tokenizer, cache, progress, template)
    refuse_unfit(examined, options)
    key = examined.fingerprint
    validation: Dataset | None
    if isinstance(options.validation, str):
        held_out = of_validation(options)
        other = examine(held_out, tokenizer, cache, progress, examined.template)
        refuse_unfit(other, held_out)
        train, validation = examined.tokens, other.tokens
        key = hashlib.sha256(f"{key}{other.fingerprint}".encode()).hexdigest()
    else:
        train, validation = split(examined.tokens, options.validation, seed)
    sample = arranged(train, examined, options, seed)
    return Prepared(
        train=_stream(examined, options, seed, validation) if options.streaming else sample,
        validation=validation,
        template=examined.template,
        counts=examined.counts,
        fingerprint=key,
        cached=examined.cached,
        sample=sample,
        train_samples=len(train),
    )


def of_validation(options: DataOptions) -> DataOptions:
    """How a file of validation rows is read: like the training rows; their template goes with them, whatever its own form is."""
    return options.model_copy(update={"path": options.validation, "streaming": False})


def _stream(examined: Examined, options: DataOptions, seed: int, validation: Dataset | None) -> StreamedRows:
    held_out = frozenset(validation["origin"]) if validation is not None else frozenset()
    return StreamedRows(examined.sources, examined.forms, examined.template, options, seed, held_out)


def split(tokens: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows in random order; a share or a number of them held out."""
    held_out = round(validation) if validation >= 1 else round(validation * len(tokens))
    if 0 < validation < 1:
        held_out = max(1, held_out)
    if held_out >= len(tokens):
        raise TooFewRowsError(
            f"data.validation={validation:g} holds out {held_out} of {len(tokens)} rows and leaves none to train on",
            fix="data.validation=0, or more data",
        )
    if not held_out:
        return tokens, None
    order = numpy.random.default_rng(seed).permutation(len(tokens))
    return tokens.select(numpy.sort(order[held_out:])), tokens.select(numpy.sort(order[:held_out]))


def arranged(train: Dataset, examined: Examined, options: DataOptions, seed: int) -> Dataset | PackedRows:
    """Training rows as often as their source's weight says, packed where that is asked for."""
    weights = [source.weight for source in examined.sources]
    if set(weights) != {1.0}:
        train = train.select(weighted(column(train, "source"), weights, seed))
    return PackedRows(train, best_fit(column(train, "length"), options.max_length)) if options.packing else train


def weighted(sources: numpy.ndarray, weights: Sequence[float], seed: int) -> numpy.ndarray:
    """Positions of rows, those of a source of weight 2.5 twice and a random half of them once more."""
    generator = numpy.random.default_rng(seed)
    places: list[numpy.ndarray] = []
    for source, weight in enumerate(weights):
        own = numpy.flatnonzero(sources == source)
        once_more = generator.permutation(own)[: round(weight % 1 * len(own))]
        places += [*[own] * int(weight), once_more]
    return numpy.sort(numpy.concatenate(places))


def column(rows: Dataset, name: str) -> numpy.ndarray:
    """A column of numbers; the others are not read.

    Datasets' own way through a selection is a slice a row: 600,000 rows took 5 s and 500 MB.
    """
    numbers: numpy.ndarray = rows.data.column(name).to_numpy()
    return numbers if rows._indices is None else numbers[rows._indices.column(0).to_numpy()]
