"""One reader of files: yields rows, each with the place it came from.

Everything that looks at data, training and checking alike, reads through `read_rows`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from nybble.errors import DataError

# The base class of every fault of the HTTP client: httpx's under huggingface_hub 1, httpx2's under 2.
CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
MAX_CSV_FIELD = 1 << 24  # csv's own default of 128 KiB is less than one long document


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    origin: str
    """`file:line` (for parquet and the Hub, the number of the row)."""


@dataclass(frozen=True)
class Source:
    """Where rows come from: local files, or one split of a Hub data set."""

    files: tuple[pathlib.Path, ...] = ()
    hub_id: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


def find_source(
    path: str | Sequence[str], *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> Source:
    """Tell local files from a Hub id.

    Raises:
        DataError: a file that is not there, is empty, or is of an unknown kind.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths or not all(paths):
        raise DataError("no data was named", fix="nybble train MODEL DATA, where DATA is a file or a Hub id")
    if len(paths) == 1 and not pathlib.Path(paths[0]).exists() and _looks_like_hub_id(paths[0]):
        return Source(hub_id=paths[0], subset=subset, split=split, revision=revision)
    return Source(files=tuple(_checked(pathlib.Path(name)) for name in paths))


def read_rows(source: Source) -> Iterator[Row]:
    """Rows in the order of the files.

    Raises:
        DataError: naming `file:line` of the first line that cannot be parsed.
    """
    if source.hub_id is not None:
        yield from _read_hub(source)
    for file in source.files:
        reader = READERS[_kind(file)]
        try:
            yield from reader(file)
        except (UnicodeDecodeError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"the file cannot be decoded: {error}", where=str(file), fix="save it as UTF-8") from error


def fingerprint(source: Source) -> str:
    """SHA-256 of what will be read: the files' bytes, or what Datasets knows of the Hub's files and their commit."""
    digest = hashlib.sha256()
    if source.hub_id is not None:
        digest.update(_open_hub(source)._fingerprint.encode())
    for file in source.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and _kind(pathlib.Path(name)) not in READERS


def _kind(file: pathlib.Path) -> str:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes else ""


def _checked(file: pathlib.Path) -> pathlib.Path:
    if not file.exists():
        raise DataError(f"there is no file {file}", fix=f"ls {file.parent}")
    if file.is_dir():
        raise DataError(f"{file} is a folder", fix="name the files in it, e.g. data.path=[a.jsonl, b.jsonl]")
    if _kind(file) not in READERS:
        raise DataError(
            f"{file.name} is of no kind that nybble reads",
            where=str(file),
            fix=f"convert it to one of {', '.join(READERS)} (each also as .gz)",
        )
    if file.stat().st_size == 0:
        raise DataError("the file is empty", where=str(file))
    return file


def _bytes(file: pathlib.Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _text(file: pathlib.Path) -> IO[str]:
    return io.TextIOWrapper(_bytes(file), encoding="utf-8-sig", newline="")


def _read_jsonl(file: pathlib.Path) -> Iterator[Row]:
    with _text(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _row(_parse(line, f"{file}:{number}"), f"{file}:{number}")


def _parse(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON: {error.msg} at column {error.colno}",
            where=origin,
            fix="one JSON object a line; mend or delete this line",
        ) from error


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"a row must be an object with named fields, not {type(value).__name__}", where=origin)
    return Row(value, origin)


def _read_json(file: pathlib.Path) -> Iterator[Row]:
    """An array of objects, decoded one by one so that each keeps its line; a file of JSON lines is read as such."""
    with _text(file) as stream:
        text = stream.read()
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        yield from _read_jsonl(file)
        return
    decoder, position, counted, line = json.JSONDecoder(), start + 1, 0, 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", where=f"{file}:{error.lineno}") from error
        yield _row(value, f"{file}:{line}")


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _read_csv(file: pathlib.Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_CSV_FIELD)
    with _text(file) as stream:
        reader = csv.DictReader(stream, strict=True)
        first = 2  # of a record; quoted fields may hold line breaks, so the record's first line is kept
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise DataError(
                        f"the row has not as many fields as the header ({', '.join(reader.fieldnames or [])})",
                        where=f"{file}:{first}",
                        fix="quote fields that contain commas or line breaks",
                    )
                yield Row(dict(values), f"{file}:{first}")
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"not valid CSV: {error}", where=f"{file}:{reader.line_num}") from error


def _read_parquet(file: pathlib.Path) -> Iterator[Row]:
    try:
        with _bytes(file) as stream:
            readable = stream if file.suffix != ".gz" else io.BytesIO(stream.read())
            number = 0
            for batch in pyarrow.parquet.ParquetFile(readable).iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file}:row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"not a parquet file: {error}", where=str(file)) from error


def _read_hub(source: Source) -> Iterator[Row]:
    for number, values in enumerate(_open_hub(source), 1):
        yield Row(dict(values), f"{source.hub_id}[{source.split}]:row {number}")


def _open_hub(source: Source) -> Dataset:
    assert source.hub_id is not None
    try:
        return load_dataset(source.hub_id, source.subset, split=source.split, revision=_commit(source))
    except (DatasetNotFoundError, ConnectionError, HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, DatasetNotFoundError) or status in (401, 403, 404):
            raise DataError(
                f"{source.hub_id} is neither a file here nor a data set on the Hub that this login can read",
                fix="check the name; for a private or gated one: hf auth login, and accept its terms on its page",
            ) from error
        raise DataError(f"the Hub could not be read for {source.hub_id}: {error}", fix="check the network") from error
    except (DatasetsError, RuntimeError) as error:  # no data files, files that cannot be parsed, a loading script
        raise DataError(f"{source.hub_id} cannot be read: {error}", fix="take a data set of plain files") from error
    except ValueError as error:  # an unknown split or subset: the message lists those that exist
        raise DataError(f"{source.hub_id}: {error}", fix="set data.split and data.subset") from error


def _commit(source: Source) -> str | None:
    """The commit a revision stands for now; as it was written where the Hub does not answer.

    Given a name, Datasets 5.2 may take another revision's rows from its cache when the Hub stumbles, and only warns.
    """
    assert source.hub_id is not None
    try:
        return HfApi().dataset_info(source.hub_id, revision=source.revision).sha
    except RevisionNotFoundError as error:
        raise DataError(
            f"{source.hub_id} has no revision {source.revision}", fix="set data.revision to one of its branches or tags"
        ) from error
    except (OSError, CLIENT_ERROR):
        return source.revision


READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
