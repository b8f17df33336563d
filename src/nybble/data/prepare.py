"""From a source to training and validation sets: read, convert, drop duplicates, tokenise, cache, split, pack."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from nybble.data.batches import PackedRows
from nybble.data.formats import Conversation, Form, detect_form
from nybble.data.packing import best_fit
from nybble.data.sources import Row, Source, find_source, fingerprint, read_rows
from nybble.data.template import Template, choose_template
from nybble.data.tokens import Tokens, encode
from nybble.errors import DataError
from nybble.recipe import DataOptions

CACHE_VERSION = 1  # raised when the same input gives other tokens
OVERLENGTH_SHARE = 0.01  # with overlength=error, up to this share of rows is dropped and counted
FAULTS_SHOWN = 5
BATCH = 512  # rows tokenised in one call: enough for the tokenizer's threads, little enough to hold
FEATURES = Features({"input_ids": List(Value("int32")), "trained": List(Value("bool")), "origin": Value("string")})
Progress = Callable[[int], None]


@dataclasses.dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    duplicates: int = 0
    overlength: int = 0
    """Rows over max_length: dropped or truncated."""
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    shortest: int = 0
    highest_id: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Data ready to train on."""

    train: Dataset | PackedRows
    validation: Dataset | None
    template: Template
    form: str
    counts: Counts
    fingerprint: str
    """SHA-256 over the source, tokenizer, template and lengths: equal means equal tokens."""
    cached: bool
    train_samples: int
    """Distinct conversations in `train`, however they are packed."""


def prepare(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: pathlib.Path,
    progress: Progress = lambda _: None,
) -> Prepared:
    """Turn the data a recipe names into token rows.

    Args:
        options: the recipe's data section.
        tokenizer: of the base model; its chat template is a candidate for the template.
        seed: of the split into training and validation rows.
        cache: folder for tokenised data.
        progress: called with the number of rows read so far.

    Raises:
        DataError: with the `file:line` of what is wrong.
    """
    source = _source(options, options.path)
    form = detect_form(read_rows(source), options.form, options.map)
    template = choose_template(tokenizer, options.template, form.name)
    tokens, counts, key, cached = _tokenised(source, form, template, options, cache, progress)
    if isinstance(options.validation, str):
        held_out = _source(options, options.validation)
        validation, _, held_key, _ = _tokenised(held_out, form, template, options, cache, progress)
        key = hashlib.sha256(f"{key}{held_key}".encode()).hexdigest()
        train = tokens
    else:
        train, validation = _split(tokens, options.validation, seed)
    return Prepared(
        train=_pack(train, options.max_length) if options.packing else train,
        validation=validation,
        template=template,
        form=form.name,
        counts=counts,
        fingerprint=key,
        cached=cached,
        train_samples=len(train),
    )


def _source(options: DataOptions, path: str | list[str]) -> Source:
    return find_source(path, subset=options.subset, split=options.split, revision=options.revision)


def _tokenised(
    source: Source, form: Form, template: Template, options: DataOptions, cache: pathlib.Path, progress: Progress
) -> tuple[Dataset, Counts, str, bool]:
    """Tokens from the cache, or made and put there. The key holds everything that decides what they are."""
    rules = options.model_dump(include={"max_length", "overlength", "train_on_prompt", "limit"})
    parts = [CACHE_VERSION, fingerprint(source), form.name, sorted(form.columns.items()), rules]
    parts += [template.fingerprint, tokenizer_fingerprint(template.tokenizer)]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    folder = cache / "tokens" / key
    cached = (folder / "counts.json").exists()
    if not cached:
        _write(folder, _tokenise(source, form, template, options, progress))
    counts = Counts(**json.loads((folder / "counts.json").read_text()))
    return Dataset.from_file(str(folder / "tokens.arrow")), counts, key, cached


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}{sorted(tokenizer.special_tokens_map.items())}".encode()).hexdigest()


def _write(folder: pathlib.Path, rows: Iterator[tuple[Tokens, str] | Counts]) -> None:
    """Write to a folder beside the cache's own and rename it: a cache entry is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        with ArrowWriter(path=str(temporary / "tokens.arrow"), features=FEATURES) as writer:
            for row in rows:
                if isinstance(row, Counts):
                    (temporary / "counts.json").write_text(json.dumps(dataclasses.asdict(row)))
                    break
                tokens, origin = row
                writer.write({"input_ids": tokens.ids, "trained": tokens.trained, "origin": origin})
            writer.finalize()
        try:
            os.rename(temporary, folder)
        except OSError:  # another process wrote the same entry meanwhile
            if not (folder / "counts.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenise(
    source: Source, form: Form, template: Template, options: DataOptions, progress: Progress
) -> Iterator[tuple[Tokens, str] | Counts]:
    """Tokens of every row that is kept with its origin, then the counts."""
    counts = Counts()
    distinct = _distinct(_conversations(read_rows(source), form, counts, progress), counts)
    for batch in _batched(itertools.islice(distinct, options.limit), BATCH):
        encoded = encode(template, [conversation for conversation, _ in batch])
        for tokens, (_, origin) in zip(encoded, batch, strict=True):
            assert tokens.ids[_last(tokens.trained)] == template.end_id, f"EOS is not trained at {origin}"
            fitted = _fit(tokens, template.end_id, options, counts)
            if fitted is None:
                continue
            if options.train_on_prompt:
                fitted = Tokens(fitted.ids, [True] * len(fitted.ids))
            counts.kept += 1
            counts.tokens += len(fitted.ids)
            counts.trained_tokens += sum(fitted.trained)
            counts.highest_id = max(counts.highest_id, *fitted.ids)
            yield fitted, origin
    _refuse_overlength(counts, options)
    yield counts


def _conversations(
    rows: Iterable[Row], form: Form, counts: Counts, progress: Progress
) -> Iterator[tuple[Conversation, str]]:
    """Every row's conversation; the faults of all rows are raised together at the end."""
    faults: list[DataError] = []
    for row in rows:
        counts.rows += 1
        if counts.rows % BATCH == 0:
            progress(counts.rows)
        try:
            yield form.conversation(row), row.origin
        except DataError as error:
            faults.append(error)
    progress(counts.rows)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        shown = [f"  {fault.where}: {fault.what}" for fault in faults[:FAULTS_SHOWN]]
        more = [f"  and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        raise DataError(
            "\n".join([f"{len(faults)} of {counts.rows} rows cannot be trained on:", *shown, *more]),
            fix=faults[0].fix or "mend or delete these rows",
        )


def _distinct(rows: Iterable[tuple[Conversation, str]], counts: Counts) -> Iterator[tuple[Conversation, str]]:
    """Without repeated conversations, so that no validation row was trained on."""
    seen: set[bytes] = set()
    for conversation, origin in rows:
        digest = hashlib.blake2b(repr(conversation).encode(), digest_size=16).digest()
        if digest in seen:
            counts.duplicates += 1
            continue
        seen.add(digest)
        yield conversation, origin


def _batched(rows: Iterator[tuple[Conversation, str]], size: int) -> Iterator[list[tuple[Conversation, str]]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _fit(tokens: Tokens, end_id: int, options: DataOptions, counts: Counts) -> Tokens | None:
    """The row if it is no longer than max_length, else what is left of it."""
    length = len(tokens.ids)
    counts.longest = max(counts.longest, length)
    counts.shortest = min(counts.shortest or length, length)
    if length <= options.max_length:
        return tokens
    counts.overlength += 1
    return truncate(tokens, options.max_length, end_id) if options.overlength == "truncate" else None


def truncate(tokens: Tokens, length: int, end_id: int) -> Tokens | None:
    """At most `length` tokens that end with a trained `end_id`; None where no answer is left."""
    trained = tokens.trained[:length]
    if trained[-1] and trained[-2]:
        return Tokens([*tokens.ids[: length - 1], end_id], trained)
    if trained[-1]:
        trained[-1] = False  # the first token of an answer alone is no answer
    if not any(trained):
        return None
    end = _last(trained) + 1
    return Tokens(tokens.ids[:end], trained[:end])


def _last(trained: list[bool]) -> int:
    return len(trained) - 1 - trained[::-1].index(True)


def _refuse_overlength(counts: Counts, options: DataOptions) -> None:
    if counts.kept == 0:
        raise DataError(
            f"all {counts.overlength} rows are longer than data.max_length={options.max_length} "
            f"({counts.shortest} to {counts.longest} tokens)",
            fix=f"data.max_length={counts.longest}, or data.overlength=truncate",
        )
    distinct = counts.rows - counts.duplicates
    if options.overlength == "error" and counts.overlength > OVERLENGTH_SHARE * distinct:
        raise DataError(
            f"{counts.overlength} of {distinct} rows are longer than data.max_length={options.max_length} "
            f"(the longest has {counts.longest} tokens); more than {OVERLENGTH_SHARE:.0%} is not dropped unasked",
            fix=f"data.max_length={counts.longest}, or data.overlength=truncate, or data.overlength=drop",
        )


def _split(tokens: Dataset, validation: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Rows in random order; a share or a number of them held out."""
    held_out = round(validation) if validation >= 1 else round(validation * len(tokens))
    if 0 < validation < 1:
        held_out = max(1, held_out)
    if held_out >= len(tokens):
        raise DataError(
            f"data.validation={validation:g} holds out {held_out} of {len(tokens)} rows and leaves none to train on",
            fix="data.validation=0, or more data",
        )
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    train = tokens.select(sorted(order[held_out:]))
    return train, tokens.select(sorted(order[:held_out])) if held_out else None


def _pack(samples: Dataset, length: int) -> PackedRows:
    lengths = [len(ids) for ids in samples.with_format("numpy")["input_ids"]]
    return PackedRows(samples, best_fit(lengths, length))
