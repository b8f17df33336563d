"""lm-eval's tasks on local files of rows.

Files are named TASK.SPLIT.jsonl or .jsonl.gz, where TASK is lm-eval's name of the task, of its data set's configuration
(winogrande_xl) or of its group (mmlu, whose rows name their `subject`). The task is then lm-eval's own YAML with another
data set; `include` keeps everything else.
"""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from nybble.data.rows.readers import TooLargeError, kind_of, read_file
from nybble.errors import DataError, EvaluationError
from nybble.evaluate.scores import MissingRowsError

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class RowsFile:
    """A file of rows, and the name of the file from which they were taken."""

    path: pathlib.Path
    origin: str


def check_files(folder: pathlib.Path, name: str, parts: Sequence[str], index: Mapping[str, Any]) -> None:
    """Check that the local files of a benchmark can be read.

    Args:
        folder: the folder of the files.
        name: the benchmark's name.
        parts: its tasks.
        index: lm-eval's tasks by name.

    Raises:
        EvaluationError: one of them cannot be read.
    """
    configs = [(index[part].cfg or {}).get("dataset_name") for part in parts]
    for stem in sorted({name, *parts, *filter(None, configs)}):
        for file in _named(folder, stem).values():
            _check(file)


def local_tasks(
    folder: pathlib.Path, name: str, parts: Sequence[str], index: Mapping[str, Any], scratch: pathlib.Path
) -> tuple[list[str], str]:
    """lm-eval's own tasks on local files.

    Args:
        folder: the folder of the local files.
        name: the benchmark's name.
        parts: its tasks.
        index: lm-eval's tasks by name.
        scratch: an empty folder.

    Returns:
        YAML files, one per task that has rows, and the name of the first file with items.

    Raises:
        MissingRowsError: no task has rows.
    """
    specs, data = [], ""
    for part in parts:
        entry = index[part]
        config: Mapping[str, Any] = entry.cfg or {}
        files = _files(folder, name, part, config, scratch)
        splits = {key: config[key] if config.get(key) in files else None for key in SPLITS if key in config}
        items = splits.get("test_split") or splits.get("validation_split")
        if items is None:
            continue
        data = data or files[items].origin
        task = {
            "include": str(entry.yaml_path), "task": part, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(file.path) for split, file in files.items()},
                "cache_dir": str(scratch / "cache"),
            },
            **splits,
        }  # fmt: skip
        file = scratch / f"{part}.yaml"
        file.write_text(yaml.safe_dump(task), encoding="utf-8")
        specs.append(str(file))
    if not specs:
        raise MissingRowsError(
            f"no file for it in {folder}", fix=f"put {name}.validation.jsonl or {name}.test.jsonl there"
        )
    return specs, data


def _files(
    folder: pathlib.Path, name: str, part: str, config: Mapping[str, Any], scratch: pathlib.Path
) -> dict[str, RowsFile]:
    """A task's files by split; from files of its group, only the rows of the task's subject."""
    for stem in filter(None, (part, config.get("dataset_name"), name)):
        named = _named(folder, stem)
        if named and stem == name != part:
            parted = {split: _of_subject(file, config["dataset_name"], scratch) for split, file in named.items()}
            return {split: RowsFile(path, named[split].name) for split, path in parted.items() if path is not None}
        if named:
            return {split: RowsFile(file, file.name) for split, file in named.items()}
    return {}


def _named(folder: pathlib.Path, stem: str) -> dict[str, pathlib.Path]:
    """The files STEM.SPLIT.jsonl, compressed or not, by split."""
    files = [file for file in sorted(folder.glob(f"{stem}.*")) if kind_of(file) == ".jsonl"]
    return {file.name.removeprefix(f"{stem}.").split(".")[0]: file for file in files}


def _check(file: pathlib.Path) -> None:
    """Refuse a file of rows that cannot be read; Datasets' own error names neither the line nor a fix.

    Raises:
        EvaluationError: the first of its faults.
    """
    try:
        for item in read_file(file):
            if isinstance(item, DataError):
                raise item
    except DataError as fault:
        # No option raises the limit of a row here.
        fix = "shorten the row, or remove it" if isinstance(fault, TooLargeError) else fault.fix
        raise EvaluationError(f"a benchmark's rows cannot be read: {fault.what}", where=fault.where, fix=fix) from fault


def _of_subject(file: pathlib.Path, subject: str, scratch: pathlib.Path) -> pathlib.Path | None:
    """A new file with the rows of one subject; None if there are none."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig") as stream:
        lines = [line for line in stream if line.strip() and json.loads(line).get("subject") == subject]
    if not lines:
        return None
    part = scratch / f"{subject}.{file.name.split('.')[1]}.jsonl"
    part.write_text("".join(lines), encoding="utf-8")
    return part
