"""From a recipe's data section to training and validation sets: examine the rows, refuse faulty data, split, weight, pack."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nybble.data.batches import PackedRows
from nybble.data.packing import best_fit, packed_length
from nybble.data.rows.formats import Target
from nybble.data.sets.examine import Examined, examine, faults_of_data
from nybble.data.sets.stream import StreamedRows
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Counts, Progress
from nybble.errors import DataError, NybbleError, TooFewRowsError
from nybble.recipe import DataOptions

OnFault = Callable[[NybbleError], None]
"""Called with each reason why data cannot be trained on: it raises the fault, or collects it so that all are found."""


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on."""

    train: Dataset | PackedRows | StreamedRows
    validation: Dataset | None
    template: Template
    counts: Counts
    fingerprint: str
    """SHA-256 of sources, tokenizer, template and length limits: equal fingerprints mean equal tokens."""
    cached: bool
    sample: Dataset | PackedRows
    """The part of `train` that can be inspected beforehand: all of it, or the examined beginning of a stream."""
    train_samples: int
    """Distinct conversations in `train`, however they are packed and weighted; for a stream, those that were examined."""

    @property
    def rows(self) -> int | None:
        """Rows per epoch; None for a stream."""
        return None if isinstance(self.train, StreamedRows) else len(self.train)


def prepare(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: pathlib.Path,
    progress: Progress = lambda _: None,
    template: Template | None = None,
    target: Target = "answers",
) -> Prepared:
    """Turn the data that a recipe names into tokenised rows.

    Args:
        options: the recipe's data section.
        tokenizer: the base model's; its chat template is a candidate for the template.
        seed: of the split into training and validation rows.
        cache: folder for tokenised data.
        progress: called with the number of rows read so far.
        template: that of the run whose rows are read again; else the options choose it.
        target: what the rows are read for.

    Raises:
        DataError: the data cannot be trained on; faults of rows come with their `file:line`.
    """
    examined = examine_rows(options, tokenizer, cache, progress=progress, template=template, target=target)
    held_out = examine_validation(options, examined.template, cache, progress=progress, target=target)
    return make_sets(examined, held_out, options, seed)


def raise_fault(fault: NybbleError) -> NoReturn:
    """Raise the first fault, as training does."""
    raise fault


def examine_rows(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    cache: pathlib.Path,
    on_fault: OnFault = raise_fault,
    progress: Progress = lambda _: None,
    template: Template | None = None,
    target: Target = "answers",
) -> Examined:
    """The rows that data.path names; raises as `examine`."""
    examined = examine(options, tokenizer, cache, progress, template, target)
    for fault in faults_of_data(examined.counts, examined.faults, examined.lengths, options):
        on_fault(fault)
    return examined


def examine_validation(
    options: DataOptions,
    template: Template,
    cache: pathlib.Path,
    on_fault: OnFault = raise_fault,
    progress: Progress = lambda _: None,
    target: Target = "answers",
) -> Examined | None:
    """The rows of the file that data.validation names, with the training rows' template; None if it names none."""
    if not isinstance(options.validation, str):
        return None
    held_out = validation_options(options)
    try:
        return examine_rows(held_out, template.tokenizer, cache, on_fault, progress, template, target)
    except DataError as fault:
        on_fault(fault)
        return None


def make_sets(examined: Examined, held_out: Examined | None, options: DataOptions, seed: int) -> Prepared:
    """Split, weight and pack the examined rows.

    Args:
        examined: the rows.
        held_out: the rows of the file that data.validation names; None if it names none.
        options: the recipe's data section.
        seed: of the split, and of the random choice that a fractional weight needs.

    Raises:
        TooFewRowsError: no rows are left to train on.
    """
    validation: Dataset | None
    if isinstance(options.validation, str):
        train, validation = examined.tokens, held_out.tokens if held_out is not None else None
    else:
        train, validation = split(examined.tokens, options.validation, seed)
    key = examined.fingerprint
    if held_out is not None:
        key = hashlib.sha256(f"{key}{held_out.fingerprint}".encode()).hexdigest()
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


def validation_options(options: DataOptions) -> DataOptions:
    """The options for the file of validation rows: those of the training rows, with another path."""
    return options.model_copy(update={"path": options.validation, "streaming": False})


def _stream(examined: Examined, options: DataOptions, seed: int, validation: Dataset | None) -> StreamedRows:
    held_out = frozenset(validation["origin"]) if validation is not None else frozenset()
    return StreamedRows(examined.sources, examined.forms, examined.template, options, seed, held_out)


def split(tokens: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows: a random share or number of the rows is held out.

    What was made from one row of the file stays together, the pieces of a long conversation or both answers of a pair, so that no
    held-out answer has its prompt among the training rows. A few more rows may be held out for it.
    """
    held_out = round(validation) if validation >= 1 else round(validation * len(tokens))
    if 0 < validation < 1:
        held_out = max(1, held_out)
    if not held_out:
        return tokens, None
    origins = numbered_origins(tokens)
    order = numpy.random.default_rng(seed).permutation(origins.max(initial=-1) + 1)
    rows_so_far = numpy.cumsum(numpy.bincount(origins)[order])
    is_held_out = numpy.isin(origins, order[: numpy.searchsorted(rows_so_far, held_out) + 1])
    if is_held_out.all():
        raise TooFewRowsError(
            f"data.validation={validation:g} holds out {is_held_out.sum()} of {len(tokens)} rows and leaves none to train on",
            fix="data.validation=0, or more data",
        )
    return tokens.select(numpy.flatnonzero(~is_held_out)), tokens.select(numpy.flatnonzero(is_held_out))


def numbered_origins(tokens: Dataset) -> numpy.ndarray:
    """(rows,) The number of each row's origin, in the order in which they first appear."""
    encoded = tokens.select_columns("origin").with_format("arrow")[:]["origin"].combine_chunks().dictionary_encode()
    numbers: numpy.ndarray = encoded.indices.to_numpy()
    return numbers


def arranged(train: Dataset, examined: Examined, options: DataOptions, seed: int) -> Dataset | PackedRows:
    """Training rows, repeated according to their source's weight, and packed if the recipe says so."""
    weights = [source.weight for source in examined.sources]
    if set(weights) != {1.0}:
        train = train.select(weighted(column(train, "source"), weights, seed))
    if not options.packing:
        return train
    return PackedRows(
        train, best_fit(column(train, "length"), packed_length(options.max_length, examined.forms.target))
    )


def weighted(sources: numpy.ndarray, weights: Sequence[float], seed: int) -> numpy.ndarray:
    """Positions of rows, repeated by weight: with weight 2.5, a source's rows come twice, and a random half of them once more."""
    generator = numpy.random.default_rng(seed)
    positions: list[numpy.ndarray] = []
    for source, weight in enumerate(weights):
        rows = numpy.flatnonzero(sources == source)
        once_more = generator.permutation(rows)[: round(weight % 1 * len(rows))]
        positions += [*[rows] * int(weight), once_more]
    return numpy.sort(numpy.concatenate(positions))


def column(rows: Dataset, name: str) -> numpy.ndarray:
    """A column of numbers; other columns are not read.

    Datasets itself reads a selection one row at a time: 600,000 rows took 5 s and 500 MB.
    """
    numbers: numpy.ndarray = rows.data.column(name).to_numpy()
    return numbers if rows._indices is None else numbers[rows._indices.column(0).to_numpy()]
