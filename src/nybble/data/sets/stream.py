"""Tokenises rows when training needs them, for data larger than the disk."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import torch

from nybble.data.batches import Sample
from nybble.data.packing import best_fit, packed_length
from nybble.data.rows.faults import Faults
from nybble.data.rows.formats import Forms
from nybble.data.rows.readers import Item, Row
from nybble.data.rows.sources import DataSource, read_rows, row_limit
from nybble.data.text.template import Template
from nybble.data.text.tokenise import Pass
from nybble.errors import DataError
from nybble.recipe import DataOptions

MAX_LOGGED = 1000  # distinct faults that are logged
BUFFER = 1000  # samples that are shuffled and packed together; rows of instructions are then 99% full
log = logging.getLogger("nybble")


class StreamedRows(torch.utils.data.IterableDataset[Any]):
    """An endless stream of samples, or of packed rows: the sources are repeated, mixed by weight, and shuffled in a buffer.

    The stream depends on the seed alone, so a resumed run skips the rows that it has had and continues where it stopped. Rows
    that cannot be trained on are left out and logged; the first rows are examined before training begins.

    Args:
        sources: of the rows.
        forms: how rows are read.
        template: how conversations become tokens.
        options: the recipe's data section.
        seed: of the mixture and the shuffling.
        held_out: origins of the validation rows, which are not trained on.
    """

    def __init__(
        self,
        sources: tuple[DataSource, ...],
        forms: Forms,
        template: Template,
        options: DataOptions,
        seed: int,
        held_out: frozenset[str],
    ) -> None:
        self.sources = sources
        self.forms = forms
        self.template = template
        self.options = options
        self.seed = seed
        self.held_out = held_out

    def __iter__(self) -> Iterator[Sample | list[Sample]]:
        generator = numpy.random.default_rng(self.seed)
        samples = samples_of(self._mixed(generator), self.forms, self.template, self.options)
        while buffer := list(itertools.islice(samples, BUFFER)):
            shuffled = [buffer[position] for position in generator.permutation(len(buffer))]
            if not self.options.packing:
                yield from shuffled
                continue
            rows = best_fit(
                [sample["length"] for sample in shuffled], packed_length(self.options.max_length, self.forms.target)
            )
            yield from ([shuffled[position] for position in rows[n]] for n in generator.permutation(len(rows)))

    def _mixed(self, generator: numpy.random.Generator) -> Iterator[Row]:
        rows = [self._endless(number) for number in range(len(self.sources))]
        weights = numpy.array([source.weight for source in self.sources])
        while True:
            for number in generator.choice(len(rows), size=BUFFER, p=weights / weights.sum()):
                yield next(rows[number])

    def _endless(self, number: int) -> Iterator[Row]:
        """A source's rows, repeated endlessly, without those held out."""
        logged: set[str] = set()
        limit = row_limit(self.options, self.forms.rules)
        while True:
            has_rows = False
            for row in _readable(read_rows(self.sources[number : number + 1], limit), logged):
                if row.origin not in self.held_out:
                    has_rows = True
                    yield replace(row, source=number)
            if not has_rows:
                raise DataError(
                    f"{self.sources[number].name} has no rows besides the {len(self.held_out)} held out",
                    fix="a smaller data.validation, or a file",
                )


def samples_of(rows: Iterable[Row], forms: Forms, template: Template, options: DataOptions) -> Iterator[Sample]:
    """Rows as samples for the collator; faulty ones are logged."""
    reading = Pass(forms, template, options, keep_duplicates=True)
    logged: set[str] = set()
    for sample in reading.samples(rows):
        for fault in reading.faults:
            _log_once(fault, logged)
        reading.row_faults = Faults()
        yield sample.as_row()


def _readable(items: Iterable[Item], logged: set[str]) -> Iterator[Row]:
    for item in items:
        if isinstance(item, Row):
            yield item
        elif isinstance(item, DataError):
            _log_once(item, logged)


def _log_once(fault: DataError, logged: set[str]) -> None:
    """Log a fault once, although its source is read repeatedly, and no more than `MAX_LOGGED` faults."""
    if str(fault) not in logged and len(logged) < MAX_LOGGED:
        logged.add(str(fault))
        log.warning("nybble: left out: %s", fault)
        if len(logged) == MAX_LOGGED:
            log.warning("nybble: further rows that are left out are not logged")
