"""Reads and tokenises rows, or loads them from the cache, with all the findings about them."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from nybble.data.rows import faults
from nybble.data.rows.formats import Forms, Rules, Target
from nybble.data.rows.reading import OpenRows
from nybble.data.rows.sources import DataSource, row_limit
from nybble.data.sets.cached_rows import load_or_tokenise
from nybble.data.text.template import Template, choose_template
from nybble.data.text.tokenise import Counts, Pass, Progress, Sample
from nybble.errors import DataError
from nybble.recipe import DataOptions

CACHE_VERSION = 6  # increased when the same input gives other findings
READING_VERSION = 3  # increased when the same input gives other tokens; it is part of the fingerprint that runs record
OVERLENGTH_SHARE = 0.01  # with overlength=error, up to this share of the rows is dropped and counted


@dataclass(frozen=True)
class Examined:
    """Data that has been read, whether it can be trained on or not."""

    tokens: Dataset
    """The rows that can be trained on: input_ids, trained, length, is_piece, source and origin."""
    sources: tuple[DataSource, ...]
    forms: Forms
    template: Template
    counts: Counts
    faults: list[DataError]
    """The first distinct ones, each with all its lines; `counts.faulty` is the number of faulty rows."""
    lengths: dict[int, int]
    """The number of rows of each length in tokens, before any is shortened."""
    fingerprint: str
    """SHA-256 of everything that decides what the tokens are."""
    cached: bool


def examine(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    cache: pathlib.Path,
    progress: Progress = lambda _: None,
    template: Template | None = None,
    target: Target = "answers",
) -> Examined:
    """Read all rows once (of a stream, the first 10,000), or load the results of an earlier pass from the cache.

    Args:
        options: the recipe's data section.
        tokenizer: the base model's.
        cache: folder for tokenised data.
        progress: called with the number of rows read so far.
        template: that of the run whose rows are read again, or of the training rows that these validate; else the options
            choose it.
        target: what the rows are read for.

    Raises:
        DataError: there is nothing to read, or the template cannot be used at all.
        StorageError: the cache does not keep what is written to it.
    """
    rules = Rules.NOW if template is None else template.rules
    with OpenRows(options, rules, cache / "data-files", target) as rows:
        sources, forms = rows.sources, rows.forms
        template = template or choose_template(tokenizer, options.template, forms.most_common)
        assert template.ends, "a template that works at all"
        key_parts = _key_parts(forms, template, options)
        # Rows and faults name their files, so these are part of the cache's key.
        locations = repr([(source.name, [str(file) for file in source.files]) for source in sources])
        variant = f"{CACHE_VERSION} {rules.value} {row_limit(options, rules)}"

        def name(is_read: bool) -> str | None:
            content = rows.fingerprint(is_read=is_read)
            if content is None:
                return None
            return hashlib.sha256(f"{variant} {_key(content, key_parts)}{locations}".encode()).hexdigest()

        def read() -> tuple[Pass, Iterator[Sample]]:
            reading = Pass(forms, template, options, progress)
            return reading, reading.samples(rows.items())

        tokens, findings, cached = load_or_tokenise(cache / "tokens", name, read)
        key = _key(str(rows.fingerprint(is_read=True)), key_parts)
    row_faults = faults.from_json(findings["faults"])
    lengths = {int(length): count for length, count in findings["lengths"].items()}
    counts = Counts(**findings["counts"])
    if any(counts.notices.values()):  # 0.5.1 refused these rows: a run of that version that dropped them had other data
        key = hashlib.sha256(f"{key} and more".encode()).hexdigest()
    return Examined(tokens, sources, forms, template, counts, row_faults, lengths, key, cached)


def faults_of_data(
    counts: Counts, row_faults: Sequence[DataError], lengths: Mapping[int, int], options: DataOptions
) -> Iterator[DataError]:
    """Every reason why data cannot be trained on with these options."""
    is_refused = counts.faulty and (options.bad_rows == "error" or counts.faulty == counts.rows)
    if is_refused and counts.faulty == 1:
        yield row_faults[0]
    elif is_refused:
        shown = faults.fault_lines(row_faults, counts.faulty)
        leave_out = "; data.bad_rows=drop leaves them out" if counts.faulty < counts.rows else ""
        yield DataError(
            "\n".join([f"{counts.faulty:,} of {counts.rows:,} rows cannot be trained on:", *shown]),
            fix=(row_faults[0].fix or "fix or delete these rows") + leave_out,
        )
    if counts.rows == 0:
        yield DataError("there are no rows")
    if counts.missing_columns and counts.faulty < counts.rows:  # else the rows' own faults say so
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


def _key_parts(forms: Forms, template: Template, options: DataOptions) -> list[Any]:
    """Everything besides the sources' content that decides what the tokens are."""
    limits = options.model_dump(include={"max_length", "overlength", "train_on", "limit", "streaming"})
    if options.max_row_mb != DataOptions().max_row_mb:  # left out by default: earlier runs have the same fingerprint
        limits["max_row_mb"] = options.max_row_mb
    columns = [(form.name, sorted(form.columns.items())) for form in forms.forms]
    target = [] if forms.target == "answers" else [forms.target]  # earlier runs have the same fingerprint
    return [columns, limits, template.fingerprint, tokenizer_fingerprint(template.tokenizer), *target]


def _key(content: str, key_parts: list[Any]) -> str:
    """A hash of everything that decides what the tokens are."""
    return hashlib.sha256(repr([READING_VERSION, content, *key_parts]).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{definition}{sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()
