"""The sources of rows: files, folders, patterns and data sets on the Hub, one or several.

Training and checking both read through `read_rows`.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import re
import shlex
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nybble.data.rows.digests import FileDigests
from nybble.data.rows.formats import Rules
from nybble.data.rows.hub import HubSplit
from nybble.data.rows.readers import (
    KINDS,
    MAX_ROW,
    MB,
    Item,
    OpenFile,
    Row,
    kind_of,
    open_data_file,
    read_rows_of,
    refuse_special,
)
from nybble.errors import DataError
from nybble.recipe import DataOptions

OLD_LIMIT = 2000 * MB  # versions up to 0.6.0 had no limit on rows
UNPACKERS = {
    ".bz2": "bunzip2 --keep",
    ".xz": "unxz --keep",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".7z": "7z x",
    ".tar": "tar xf",
}
PATTERN = frozenset("*?[")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Paths = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class DataSource:
    """One of the sources that a recipe names: its files, or one split of a data set on the Hub."""

    name: str
    files: tuple[pathlib.Path, ...] = ()
    hub: HubSplit | None = None
    weight: float = 1.0
    """How often each of its rows is used in an epoch; in a stream, the relative rate at which its rows are drawn."""


def find_sources(
    paths: Paths,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> tuple[DataSource, ...]:
    """Find the files that names stand for, or the data sets on the Hub.

    Args:
        paths: one name, several, or names with weights.
        subset: configuration of a data set on the Hub.
        split: of a data set on the Hub.
        revision: of a data set on the Hub.
        streaming: whether rows from the Hub are read when they are needed, instead of downloaded first.

    Raises:
        DataError: a file is missing or of an unknown kind, or a folder or pattern has no files.
    """
    weights = paths if isinstance(paths, Mapping) else dict.fromkeys([paths] if isinstance(paths, str) else paths, 1.0)
    if not weights or not all(weights):
        raise DataError("no data was given", fix="nybble train MODEL DATA, where DATA is a file or a Hub id")
    sources = []
    for name, weight in weights.items():
        files = _files(name)
        hub = None if files else HubSplit(name, subset, split, revision, streaming)
        sources.append(DataSource(name, files, hub, weight))
    return tuple(sources)


def sources_of(options: DataOptions) -> tuple[DataSource, ...]:
    """The sources of a recipe's data section; raises as `find_sources`."""
    return find_sources(
        options.path,
        subset=options.subset,
        split=options.split,
        revision=options.revision,
        streaming=options.streaming,
    )


def row_limit(options: DataOptions, rules: Rules) -> int:
    """The maximum size of a row: characters of text, bytes of parquet.

    Args:
        options: the recipe's data section.
        rules: the version's rules by which rows are read.
    """
    return OLD_LIMIT if rules < Rules.NOW else options.max_row_mb * MB


def read_rows(
    sources: Sequence[DataSource], limit: int = MAX_ROW, digests: FileDigests | None = None
) -> Generator[Item, None, None]:
    """Rows in the order of their sources, notices, and a fault in place of each row that cannot be read.

    Args:
        sources: of the rows.
        limit: the maximum size of a row, from `row_limit`.
        digests: computes the files' digests on the way.
    """
    for number, source in enumerate(sources):
        for item in _read(source, limit, digests):
            yield replace(item, source=number) if number and isinstance(item, Row) else item


def _read(source: DataSource, limit: int, digests: FileDigests | None) -> Iterator[Item]:
    if source.hub is not None:
        yield from source.hub.rows()
    for path in source.files:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open_data_file(path))
            except DataError as error:
                yield error
                continue
            if digests is not None:
                stack.enter_context(digests.reading(file))
            yield from _read_file(file, limit)


def _read_file(file: OpenFile, limit: int) -> Iterator[Item]:
    try:
        for item in read_rows_of(file, limit):
            # Only then: copying a row takes longer than reading a short one.
            if isinstance(item, Row) and not item.origin.isascii():
                item = replace(item, origin=_printable(item.origin))
            yield item
    except DataError as error:
        yield error


def _printable(origin: str) -> str:
    """An origin that can be encoded: a file's name need not be UTF-8."""
    return origin.encode(errors="replace").decode()


def fingerprint(sources: Sequence[DataSource], digests: Mapping[pathlib.Path, str]) -> str:
    """SHA-256 of the sources' content: of the files' bytes, or of Datasets' fingerprint of the Hub's files.

    Args:
        sources: of the rows.
        digests: SHA-256 of each of their files.
    """
    total = hashlib.sha256()
    for source in sources:
        if source.hub is not None:
            total.update(source.hub.fingerprint.encode())
        for file in source.files:
            total.update(bytes.fromhex(digests[file]))
    return total.hexdigest()


def _files(name: str) -> tuple[pathlib.Path, ...]:
    """The files that a name stands for; none if it can only be a Hub id."""
    if name == "-":
        raise DataError("nybble does not read data from standard input", fix="write it to a file, such as rows.jsonl")
    path = pathlib.Path(name).expanduser()
    if _exists(path, name) and path.is_dir():
        _refuse_save_to_disk(path)
        inside = sorted(file for file in path.rglob("*") if _is_data(file.relative_to(path)) and not file.is_dir())
        if not inside:
            raise DataError(f"the folder {path} contains no file that nybble reads", fix=_kinds_fix(path))
        for file in inside:
            refuse_special(file)
        return tuple(inside)
    if path.exists() or path.is_symlink():
        refuse_special(path)
        if kind_of(path) not in KINDS:
            raise DataError(
                f"{path.name} is not a kind of file that nybble reads", where=str(path), fix=_kinds_fix(path)
            )
        return (path,)
    if PATTERN & set(name):
        root = pathlib.Path(path.anchor or ".")
        matches = sorted(file for file in root.glob(str(path.relative_to(path.anchor))) if not file.is_dir())
        if not matches:
            raise DataError(f"no file matches {name}", fix="put the pattern in quotes, and check it with ls")
        return tuple(file for match in matches for file in _files(str(match)))
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or kind_of(path) in KINDS:
        raise DataError(f"there is no file {path}", fix=f"ls {shlex.quote(str(path.parent))}")
    if not HUB_ID.fullmatch(name):
        raise DataError(f"there is no file {name!r:.100}, and it is not a Hub id (owner/name)", fix="check the path")
    return ()


def _exists(path: pathlib.Path, name: str) -> bool:
    """Whether there is something at a path, even a broken link.

    Raises:
        DataError: it is not a valid path on this machine, or it may not be accessed.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name that is too long, a null character, a folder that may not be read
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{name[:100]!r} cannot be read: {why}", fix="check the path") from error
    return True


def _is_data(file: pathlib.Path) -> bool:
    """Whether a file in a folder is data; what tools leave there, such as .ipynb_checkpoints and ._rows.jsonl, is hidden."""
    return kind_of(file) in KINDS and not any(part.startswith(".") for part in file.parts)


def _refuse_save_to_disk(folder: pathlib.Path) -> None:
    """Refuse a folder written by Datasets' save_to_disk: it has arrow files, and JSON files that are not rows."""
    has_splits = (folder / "dataset_dict.json").exists()
    if has_splits or (folder / "state.json").exists():
        split = '["train"]' if has_splits else ""
        raise DataError(
            f"{folder} was written by Datasets' save_to_disk; nybble does not read its arrow files",
            fix=f'python -c \'from datasets import load_from_disk as load; load("{folder}"){split}'
            f'.to_parquet("{folder}.parquet")\'',
        )


def _kinds_fix(path: pathlib.Path) -> str:
    if (unpacker := UNPACKERS.get(path.suffix.lower())) is not None:
        return f"unpack it: {unpacker} {shlex.quote(str(path))}"
    return f"convert it to one of {', '.join(KINDS)} (each also as .gz)"
