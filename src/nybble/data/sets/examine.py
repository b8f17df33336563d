"""Rows read and tokenised, or taken from the cache, with everything that was found out about them on the way."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nybble.data.rows import faults
from nybble.data.rows.formats import Forms, Rules
from nybble.data.rows.reading import OpenRows
from nybble.data.rows.sources import DataSource, row_limit
from nybble.data.sets.cached_rows import rows_in
from nybble.data.text.template import Template, choose_template
from nybble.data.text.tokenise import Counts, Pass, Progress, Sample
from nybble.errors import DataError
from nybble.recipe import DataOptions

CACHE_VERSION = 6  # raised when other things are found in the same input
READING_VERSION = 3  # raised when the same input gives other tokens; runs hold the fingerprint that it is part of
OVERLENGTH_SHARE = 0.01  # with overlength=error, up to this share of rows is dropped and counted


@dataclass(frozen=True)
class Examined:
    """Data as it was found, whether it can be trained on or not."""

    tokens: Dataset
    """The rows that can be trained on: input_ids, trained, length, is_piece, source and origin."""
    sources: tuple[DataSource, ...]
    forms: Forms
    template: Template
    counts: Counts
    faults: list[DataError]
    """The first different ones, each with all its lines; `counts.faulty` says how many rows there are."""
    lengths: dict[int, int]
    """How many rows have so many tokens, before any is cut."""
    fingerprint: str
    """SHA-256 of all that decides what the tokens are."""
    cached: bool


def examine(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    cache: pathlib.Path,
    progress: Progress = lambda _: None,
    template: Template | None = None,
) -> Examined:
    """Read all rows once, of a stream the first 10,000, or take what an earlier pass found.

    Args:
        options: the recipe's data section.
        tokenizer: of the base model.
        cache: folder for tokenised data.
        progress: called with the number of rows read so far.
        template: of a run whose rows are read again, or of the rows that these belong to; else the options choose it.

    Raises:
        DataError: there is nothing to read, or the template cannot be used at all.
        StorageError: the cache does not keep what is written to it.
    """
    rules = Rules.NOW if template is None else template.rules
    with OpenRows(options, rules, cache / "data-files") as rows:
        sources, forms = rows.sources, rows.forms
        template = template or choose_template(tokenizer, options.template, forms.most_common)
        assert template.ends, "a template that works at all"
        decisive = _decisive(forms, template, options)
        # As rows and faults say where they are from.
        places = repr([(source.name, [str(file) for file in source.files]) for source in sources])
        variant = f"{CACHE_VERSION} {rules.value} {row_limit(options, rules)}"

        def name(is_read: bool) -> str | None:
            content = rows.fingerprint(is_read=is_read)
            if content is None:
                return None
            return hashlib.sha256(f"{variant} {_key(content, decisive)}{places}".encode()).hexdigest()

        def read() -> tuple[Pass, Iterator[Sample]]:
            reading = Pass(forms, template, options, progress)
            return reading, reading.samples(rows.items())

        tokens, found, cached = rows_in(cache / "tokens", name, read)
        key = _key(str(rows.fingerprint(is_read=True)), decisive)
    found_faults = faults.from_json(found["faults"])
    lengths = {int(length): count for length, count in found["lengths"].items()}
    counts = Counts(**found["counts"])
    if any(counts.notices.values()):  # rows that 0.5.1 refused: a run of it that left them out had other data
        key = hashlib.sha256(f"{key} and more".encode()).hexdigest()
    return Examined(tokens, sources, forms, template, counts, found_faults, lengths, key, cached)


def unfit(
    counts: Counts, wrong: Sequence[DataError], lengths: Mapping[int, int], options: DataOptions
) -> Iterator[DataError]:
    """Every reason why data cannot be trained on with these options."""
    is_refused = counts.faulty and (options.bad_rows == "error" or counts.faulty == counts.rows)
    if is_refused and counts.faulty == 1:
        yield wrong[0]
    elif is_refused:
        shown = faults.fault_lines(wrong, counts.faulty)
        leave_out = "; data.bad_rows=drop leaves them out" if counts.faulty < counts.rows else ""
        yield DataError(
            "\n".join([f"{counts.faulty:,} of {counts.rows:,} rows cannot be trained on:", *shown]),
            fix=(wrong[0].fix or "fix or delete these rows") + leave_out,
        )
    if counts.rows == 0:
        yield DataError("there are no rows")
    if counts.missing_columns and counts.faulty < counts.rows:  # else the rows have said so
        yield DataError(
            f"no row has {', '.join(map(repr, counts.missing_columns))}, which data.map names",
            fix="correct the name, or take it out of data.map",
        )
    if counts.kept == 0 and counts.overlength:
        shortest, longest = min(lengths), max(lengths)
        yield DataError(
            f"all {counts.overlength} rows are longer than data.max_length={options.max_length} "
            f"({shortest} to {longest} tokens)",
            fix=f"data.max_length={longest}, or data.overlength=truncate",
        )
    elif options.overlength == "error" and counts.overlength > OVERLENGTH_SHARE * counts.distinct:
        longest = max(lengths)
        yield DataError(
            f"{counts.overlength:,} of {counts.distinct:,} rows are longer than data.max_length={options.max_length} "
            f"(the longest has {longest:,} tokens); nybble drops more than {OVERLENGTH_SHARE:.0%} only if asked. Truncated, "
            f"they would lose {counts.lost_answer_tokens:,} answer tokens",
            fix=f"data.max_length={longest}, or data.overlength=truncate, or data.overlength=drop",
        )


def _decisive(forms: Forms, template: Template, options: DataOptions) -> list[Any]:
    """What decides, besides the sources' content, what the tokens are."""
    rules = options.model_dump(include={"max_length", "overlength", "train_on", "limit", "streaming"})
    if options.max_row_mb != DataOptions().max_row_mb:  # runs of before the option have the same fingerprint
        rules["max_row_mb"] = options.max_row_mb
    columns = [(form.name, sorted(form.columns.items())) for form in forms.forms]
    return [columns, rules, template.fingerprint, tokenizer_fingerprint(template.tokenizer)]


def _key(content: str, decisive: list[Any]) -> str:
    """A hash of everything that decides what the tokens are."""
    return hashlib.sha256(repr([READING_VERSION, content, *decisive]).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}{sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()
