"""Tokenised rows in the cache: they are written, read back, and found again in later runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pyarrow
import xxhash
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from nybble.data.rows import faults
from nybble.data.text.tokenise import Pass, Sample
from nybble.errors import StorageError
from nybble.files import cache as entries
from nybble.files.atomic import put_in_place
from nybble.files.paths import ANOTHER_CACHE

TRIES = 4
TOKENS_FILE, FINDINGS_FILE = "tokens.arrow", "found.json"
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "length": Value("int32"),
        "is_piece": Value("bool"),
        "source": Value("int32"),
        "origin": Value("string"),
    }
)
JUDGED_FEATURES = Features(
    FEATURES | {"prompt": Value("int32"), "rejected": List(Value("int32")), "is_good": Value("bool")}
)
logger = logging.getLogger(__name__)


def load_or_tokenise(
    folder: pathlib.Path,
    name: Callable[[bool], str | None],
    read: Callable[[], tuple[Pass, Iterable[Sample]]],
) -> tuple[Dataset, Any, bool]:
    """The rows of a cache entry with the findings about them, and whether they were in the cache already.

    Args:
        folder: of the entries.
        name: returns the entry's name; its argument is whether the rows have been read. Before that, None if it is unknown.
        read: begins the pass that tokenises the rows; called if the entry is missing or damaged.

    Raises:
        StorageError: the cache does not keep what is written to it.
    """
    made = False
    for _ in range(TRIES):
        known = name(made)
        entry = _find(folder / known, made) if known is not None else None
        if entry is not None and entry.facts is not None:
            with contextlib.suppress(FileNotFoundError):  # another process took it for damaged, and makes it again
                findings = json.loads((entry.path / FINDINGS_FILE).read_text(encoding="utf-8"))
                return Dataset.from_file(str(entry.path / TOKENS_FILE)), findings, not made
        with contextlib.suppress(FileExistsError), entries.temporary_entry(folder) as temporary:
            _write(temporary, *read())
            entry = entry or _find(folder / str(name(True)), made)
            entries.seal(temporary, entry.path, {})
            put_in_place(temporary, entry.path, entries.MANIFEST)
            made = True
    raise StorageError("tokenised rows do not stay as they are written", where=str(folder), fix=ANOTHER_CACHE)


def _find(folder: pathlib.Path, made: bool) -> entries.Entry:
    entry = entries.find(folder)
    if not made:
        for notice in entry.notices("the cached rows were", "are tokenised again"):
            logger.warning("%s", notice)
    return entry


def _write(folder: pathlib.Path, reading: Pass, samples: Iterable[Sample]) -> None:
    written = _Digest()
    features = FEATURES if reading.forms.target == "answers" else JUDGED_FEATURES
    with ArrowWriter(path=str(folder / TOKENS_FILE), features=features) as writer:
        for sample in samples:
            row = sample.as_row()
            writer.write(row)
            written.add(row)
        writer.finalize()
    findings = {
        "counts": dataclasses.asdict(reading.counts),
        "faults": faults.as_json(reading.faults),
        "lengths": reading.lengths,
    }
    text = json.dumps(findings)
    (folder / FINDINGS_FILE).write_text(text, encoding="utf-8")
    if (
        written.value() != _read_back(folder / TOKENS_FILE)
        or (folder / FINDINGS_FILE).read_text(encoding="utf-8") != text
    ):
        raise StorageError("tokenised rows are read back differently", where=str(folder.parent), fix=ANOTHER_CACHE)


@dataclass
class _Digest:
    """A running digest of rows: of their ids, masks, three numbers each, origins, and what is known of judged answers."""

    parts: dict[str, Any] = field(
        default_factory=lambda: {
            name: xxhash.xxh3_128() for name in ("input_ids", "trained", "numbers", "origin", "rejected", "judged")
        }
    )

    def add(self, row: dict[str, Any]) -> None:
        """Add one row as it is written into the file."""
        self.parts["input_ids"].update(numpy.asarray(row["input_ids"], numpy.int32))
        self.parts["trained"].update(numpy.asarray(row["trained"], numpy.uint8))
        self.parts["numbers"].update(struct.pack("=iii", row["length"], row["source"], row["is_piece"]))
        self.parts["origin"].update(f"{row['origin']}\n".encode())
        if "rejected" in row:
            self.parts["rejected"].update(numpy.asarray(row["rejected"], numpy.int32))
            self.parts["judged"].update(struct.pack("=iii", row["prompt"], len(row["rejected"]), row["is_good"]))

    def value(self) -> list[str]:
        """The digests of the rows so far."""
        return [part.hexdigest() for part in self.parts.values()]


def _read_back(file: pathlib.Path) -> list[str]:
    """The digest of the rows in a file, read in batches."""
    digest = _Digest()
    for batch in Dataset.from_file(str(file)).data.to_batches():
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        digest.parts["input_ids"].update(columns["input_ids"].flatten().to_numpy())
        digest.parts["trained"].update(columns["trained"].flatten().cast(pyarrow.uint8()).to_numpy())
        numbers = [columns[name].cast(pyarrow.int32()).to_numpy() for name in ("length", "source", "is_piece")]
        digest.parts["numbers"].update(numpy.ascontiguousarray(numpy.stack(numbers, 1)))
        digest.parts["origin"].update("".join(f"{origin}\n" for origin in columns["origin"].to_pylist()).encode())
        if "rejected" in columns:
            rejected = columns["rejected"]
            digest.parts["rejected"].update(rejected.flatten().to_numpy())
            sizes = rejected.value_lengths().to_numpy()
            good = columns["is_good"].cast(pyarrow.int32()).to_numpy()
            facts = numpy.stack([columns["prompt"].to_numpy(), sizes, good], 1)
            digest.parts["judged"].update(numpy.ascontiguousarray(facts.astype(numpy.int32)))
    return digest.value()
