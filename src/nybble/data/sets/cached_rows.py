"""Tokenised rows in the cache: written, read back, found again."""

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
ROWS, FOUND = "tokens.arrow", "found.json"
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
logger = logging.getLogger(__name__)


def rows_in(
    room: pathlib.Path,
    name: Callable[[bool], str | None],
    read: Callable[[], tuple[Pass, Iterable[Sample]]],
) -> tuple[Dataset, Any, bool]:
    """The rows of an entry of the cache with all that was found about them, and whether they were there already.

    Args:
        room: folder of the entries.
        name: of the entry, given whether the rows have been read; before that, None if only then it is known.
        read: begins the pass that makes them; called where the entry is missing or damaged.

    Raises:
        StorageError: the cache does not keep what is written to it.
    """
    made = False
    for _ in range(TRIES):
        known = name(made)
        entry = _find(room / known, made) if known is not None else None
        if entry is not None and entry.facts is not None:
            with contextlib.suppress(FileNotFoundError):  # another process took it for damaged, and makes it again
                found = json.loads((entry.path / FOUND).read_text(encoding="utf-8"))
                return Dataset.from_file(str(entry.path / ROWS)), found, not made
        with contextlib.suppress(FileExistsError), entries.temporary_entry(room) as temporary:
            _write(temporary, *read())
            entry = entry or _find(room / str(name(True)), made)
            entries.seal(temporary, entry.path, {})
            put_in_place(temporary, entry.path, entries.MANIFEST)
            made = True
    raise StorageError("tokenised rows do not stay as they are written", where=str(room), fix=ANOTHER_CACHE)


def _find(folder: pathlib.Path, made: bool) -> entries.Entry:
    entry = entries.find(folder)
    if not made:
        for notice in entry.notices("the cached rows were", "are tokenised again"):
            logger.warning("%s", notice)
    return entry


def _write(folder: pathlib.Path, reading: Pass, samples: Iterable[Sample]) -> None:
    written = _Digest()
    with ArrowWriter(path=str(folder / ROWS), features=FEATURES) as writer:
        for sample in samples:
            tokens = sample.tokens
            row = {
                "input_ids": tokens.ids,
                "trained": tokens.trained,
                "length": len(tokens.ids),
                "is_piece": sample.is_piece,
                "source": sample.source,
                "origin": sample.origin,
            }
            writer.write(row)
            written.add(row)
        writer.finalize()
    found = {
        "counts": dataclasses.asdict(reading.counts),
        "faults": faults.as_json(reading.faults),
        "lengths": reading.lengths,
    }
    text = json.dumps(found)
    (folder / FOUND).write_text(text, encoding="utf-8")
    if written.value() != _read_back(folder / ROWS) or (folder / FOUND).read_text(encoding="utf-8") != text:
        raise StorageError("tokenised rows are read back differently", where=str(folder.parent), fix=ANOTHER_CACHE)


@dataclass
class _Digest:
    """Of rows one after another: ids, mask, the three numbers of each row, and origins."""

    parts: dict[str, Any] = field(
        default_factory=lambda: {name: xxhash.xxh3_128() for name in ("input_ids", "trained", "numbers", "origin")}
    )

    def add(self, row: dict[str, Any]) -> None:
        """One row as it goes into the file."""
        self.parts["input_ids"].update(numpy.asarray(row["input_ids"], numpy.int32))
        self.parts["trained"].update(numpy.asarray(row["trained"], numpy.uint8))
        self.parts["numbers"].update(struct.pack("=iii", row["length"], row["source"], row["is_piece"]))
        self.parts["origin"].update(f"{row['origin']}\n".encode())

    def value(self) -> list[str]:
        """As far as it goes."""
        return [part.hexdigest() for part in self.parts.values()]


def _read_back(file: pathlib.Path) -> list[str]:
    """The digest of the rows in a file, a batch of the file at a time."""
    read = _Digest()
    for batch in Dataset.from_file(str(file)).data.to_batches():
        columns = {name: batch.column(name) for name in FEATURES}
        read.parts["input_ids"].update(columns["input_ids"].flatten().to_numpy())
        read.parts["trained"].update(columns["trained"].flatten().cast(pyarrow.uint8()).to_numpy())
        numbers = [columns[name].cast(pyarrow.int32()).to_numpy() for name in ("length", "source", "is_piece")]
        read.parts["numbers"].update(numpy.ascontiguousarray(numpy.stack(numbers, 1)))
        read.parts["origin"].update("".join(f"{origin}\n" for origin in columns["origin"].to_pylist()).encode())
    return read.value()
