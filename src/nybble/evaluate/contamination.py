"""Which benchmark items the training rows contain, by their 13-grams (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy

WORD = re.compile(r"[^\W_]+")
GRAM = 13
SHORTEST = 8
BATCH = 2**18  # words looked up at once: about 10 MB
UNKNOWN = 0  # a word that no item has, or the end of a text
FACTOR = 0x9E3779B97F4A7C15

Whole = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int64]]
Hashes = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint64]]


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one length of all items."""

    hashes: Hashes  # sorted, without duplicates
    owners: Whole  # the item of each gram
    indices: Whole  # the index of each gram in `hashes`
    seen: numpy.ndarray  # which of `hashes` the training rows contain


def flag(training: Iterable[str], items: Mapping[str, Sequence[str]]) -> dict[str, list[bool]]:
    """Which items share 13 words in a row with a training row; words are lower-cased runs of letters and digits.

    An item of 8 to 12 words is flagged if a row contains all of it. GPT-3 also went down to 8 words: below that, a match is more
    often a common phrase ("How do you make a paper plane?") than a copy, so shorter items are never flagged.
    Pass an item as the question followed by its right answer, since 56% of piqa's goals alone have fewer than 8 words, and
    winogrande's sentence with its blank filled, since a row that gives the sentence away has it filled.

    Args:
        training: the rows as text, read once; only the items are kept in memory.
        items: for each task, one text per item.

    Returns:
        For each task, one flag per item.
    """
    vocabulary: dict[str, int] = {}
    texts = [
        [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)]
        for task in items.values()
        for text in task
    ]
    index = _index(texts)
    for ids in _batches(training, vocabulary):
        for length, _, hashes in _windows(ids, index):
            _mark(index[length], hashes)
    flagged = numpy.zeros(len(texts), dtype=bool)
    for grams in index.values():
        flagged[grams.owners[grams.seen[grams.indices]]] = True
    ends = numpy.cumsum([len(task) for task in items.values()])[:-1]
    return {name: part.tolist() for name, part in zip(items, numpy.split(flagged, ends), strict=True)} if items else {}


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _index(texts: Sequence[Sequence[int]]) -> dict[int, _Grams]:
    sizes = numpy.array([len(ids) for ids in texts], dtype=numpy.int64)
    lengths = numpy.where(sizes < SHORTEST, 0, numpy.minimum(sizes, GRAM))  # the length of each item's grams
    owners = numpy.repeat(numpy.arange(len(texts)), sizes + 1)
    ids = numpy.array([word for ids in texts for word in (*ids, UNKNOWN)], dtype=numpy.int64)
    index = {}
    for length, starts, hashes in _windows(ids, set(lengths.tolist()) - {0}):
        used = lengths[owners[starts]] == length
        distinct, indices = numpy.unique(hashes[used], return_inverse=True)
        index[length] = _Grams(distinct, owners[starts[used]], indices, numpy.zeros(len(distinct), dtype=bool))
    return index


def _batches(training: Iterable[str], vocabulary: Mapping[str, int]) -> Iterator[Whole]:
    """The words of the rows as ids, with UNKNOWN after each row."""
    ids: list[int] = []
    for text in training:
        ids += [vocabulary.get(word, UNKNOWN) for word in words(text)]
        ids.append(UNKNOWN)
        if len(ids) >= BATCH:
            yield numpy.array(ids, dtype=numpy.int64)
            ids = []
    if ids:
        yield numpy.array(ids, dtype=numpy.int64)


def _windows(ids: Whole, lengths: Iterable[int]) -> Iterator[tuple[int, Whole, Hashes]]:
    """For each length, the starts of its windows of known words, and their 64-bit hashes.

    A million grams of items and a billion grams of training rows collide once in 20,000 runs.
    """
    mixed = _mixed(ids.astype(numpy.uint64))
    unknown = numpy.concatenate([[0], numpy.cumsum(ids == UNKNOWN)])
    hashes, width = numpy.zeros(len(ids), dtype=numpy.uint64), 0
    for length in sorted(lengths):
        if length > len(ids):
            return
        while width < length:
            count = len(ids) - width
            hashes = hashes[:count] * numpy.uint64(FACTOR) + mixed[width:]
            width += 1
        starts = numpy.flatnonzero(unknown[length:] == unknown[:-length])
        yield length, starts, hashes[starts]


def _mixed(ids: Hashes) -> Hashes:
    """Each id spread over 64 bits (splitmix64), the same in every process."""
    mixed = ids * numpy.uint64(FACTOR)
    mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> numpy.uint64(31))


def _mark(grams: _Grams, hashes: Hashes) -> None:
    indices = numpy.searchsorted(grams.hashes, hashes)
    indices[indices == len(grams.hashes)] = 0
    grams.seen[indices[grams.hashes[indices] == hashes]] = True
