"""start.json: how a run started. It is compared with the present state when the run is resumed or used.

Recipe, fingerprints and versions are compared when a run is resumed (`nybble.run.identity`), digests of tokenizer and template
whenever it is used, and the bits of the quantised base when the base is loaded (`nybble.model.base.cached`).
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from nybble.errors import RunError
from nybble.files.reading import RESTORE, as_shape
from nybble.files.writing import write_json
from nybble.recipe import PATH_OPTIONS, Recipe
from nybble.run.records import AnyText, FileEntry, FrozenShape, RunRecord, read_versioned
from nybble.run.versions import versions

FILES = "files"
QUANTIZED = "quantized_base"
MICRO_BATCH, ACCUMULATION, PROCESSES = SPLIT = "micro_batch", "accumulation", "processes"
DECIDING = ("model", "adapter", "lora", "data", "train", "preference")  # sections whose options affect a run's numbers


class MadeBy(FrozenShape):
    """What quantised bits depend on besides the weights."""

    device: AnyText
    dtype: AnyText
    bitsandbytes: AnyText
    torch: AnyText

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.as_json().items())


class QuantizedBase(FrozenShape):
    """The bits of a base that nybble quantised."""

    digest: AnyText
    """XXH3 of 128 bits over name, type, shape and bytes of each tensor, including the scales."""
    made: MadeBy


class RecordedRecipe(FrozenShape):
    """A recipe's sections; their options are compared, not used."""

    model_config = ConfigDict(extra="allow")

    model: dict[str, Any]
    adapter: AnyText | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any]
    train: dict[str, Any] = Field(default_factory=dict)
    preference: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    tracker: dict[str, Any] = Field(default_factory=dict)
    export: dict[str, Any] = Field(default_factory=dict)


class Start(RunRecord):
    """What must be unchanged when a run is resumed.

    It is written without its version: 0.7.0 compares every key when it resumes a run, and would refuse a key that it does not
    know. From version 2 on, the number must be written.
    """

    recipe: RecordedRecipe
    """With absolute paths; before 0.6, with paths as they were typed."""
    data: AnyText
    """Fingerprint of the rows."""
    base: AnyText
    """Fingerprint of the weights: sha256:... for a folder, owner/name@commit for the Hub."""
    versions: dict[AnyText, AnyText]
    quantized_base: QuantizedBase | None = None
    """None where nybble did not quantise the base, and before 0.7."""
    files: dict[AnyText, FileEntry] | None = None
    """Files of tokenizer and template; None before 0.7."""

    @property
    def is_base_a_folder(self) -> bool:
        """Whether the base was a folder, not a commit of the Hub."""
        return self.base.startswith("sha256:")


def start_record(recipe: Recipe, data: str, base: str, quantized: QuantizedBase | None) -> Start:
    """The record of a run that starts now.

    Args:
        recipe: with absolute paths.
        data: fingerprint of the rows.
        base: fingerprint of the weights.
        quantized: the bits of the base; None where nybble did not quantise it.
    """
    return Start(
        recipe=RecordedRecipe.model_validate(recipe.model_dump(exclude={"out"})),
        data=data,
        base=base,
        versions=versions(),
        quantized_base=quantized,
    )


def read_start(file: pathlib.Path) -> Start:
    """The record of a run.

    Raises:
        RunError: it is missing or damaged, or a newer nybble wrote it.
    """
    stored = read_versioned(file, Start)
    _check_quantized(file, stored.get(QUANTIZED))
    return as_shape(stored, file, Start, RunError, RESTORE)


def _check_quantized(file: pathlib.Path, stored: object) -> None:
    """Report a damaged record of the quantised base separately: a run can be used without it."""
    try:
        if stored is not None:
            QuantizedBase.model_validate(stored)
    except ValidationError as error:
        raise RunError(
            f"the record of the quantised base is damaged: {QUANTIZED} is {str(stored)[:80]}",
            where=str(file),
            fix=f"copy start.json again; or delete {QUANTIZED} from it, and the base is used without this check",
        ) from error


def write_start(file: pathlib.Path, start: Start, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the record, with the sizes and digests of tokenizer and template."""
    write_json(file, {**start.as_json(), FILES: {name: dict(entry) for name, entry in files.items()}})


def with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe, with the defaults of options that its version did not have."""
    sections = Recipe().model_dump(exclude={"out"})
    return {
        name: {**default, **recipe.get(name, {})} if isinstance(default, dict) else recipe.get(name, default)
        for name, default in sections.items()
    }


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """The differences between two trees of options, one per line: path, old value, new value."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [d for key in keys for d in differences(then.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if then == now else [f"{path.removeprefix('recipe.')}: {then!r} -> {now!r}"]


def ignore_split(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Where two recipes have steps of the same rows, differently split into micro batches and processes, write the split of `now`
    into `then`.

    A run changes its split if a micro batch does not fit in memory (`nybble.training.halving`), or if it is resumed on another
    number of processes (`nybble.run.split`). A step has the same rows however it is split (`nybble.data.order`), so its loss and
    gradient are the same up to rounding, without dropout.
    """
    train, other = then["train"], now["train"]
    steps = [math.prod(section[name] for name in SPLIT) for section in (train, other) if _is_split(section)]
    if len(steps) == 2 and steps[0] == steps[1]:
        train.update({name: other[name] for name in SPLIT})


def _is_split(train: Mapping[str, Any]) -> bool:
    return all(isinstance(train.get(name), int) for name in SPLIT)


def ignore_places(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Where two recipes have the same kind of thing in different places, write the path or device of `then` into `now`."""
    for path in (*PATH_OPTIONS, "model.device"):
        *section, name = path.split(".")
        before, after = (tree[section[0]] if section else tree for tree in (then, now))
        if after.get(name) and type(after[name]) is type(before.get(name)):
            after[name] = before[name]


def halved_from(start: Start, recipe: Recipe) -> int | None:
    """The micro batch that a run was started with, if its recipe has a smaller one by now, on as many processes."""
    first, train = start.recipe.train.get(MICRO_BATCH), recipe.train
    is_smaller = isinstance(first, int) and first > train.micro_batch
    return first if is_smaller and start.recipe.train.get(PROCESSES, 1) == train.processes else None


def check_recipe(recipe: Recipe, file: pathlib.Path) -> None:
    """Compare a run's recipe.yaml with start.json: a file that lost its end is still valid YAML, with other options.

    Paths may have changed since, and so may options that do not affect the run's numbers, and the split of steps into micro
    batches.

    Args:
        recipe: the content of the file, with absolute paths.
        file: recipe.yaml.

    Raises:
        RunError: naming each option that differs, or the record is damaged.
    """
    record = file.parent / "start.json"
    if not record.exists():
        return
    now = json.loads(json.dumps(recipe.model_dump(include=set(DECIDING))))
    recorded = with_defaults(read_start(record).recipe.as_json())
    then = {name: recorded[name] for name in now}
    ignore_places(then, now)
    ignore_split(then, now)
    if changes := differences(then, now):
        raise RunError(
            "recipe.yaml is not the recipe that this run was started with:\n"
            + "\n".join(f"  - {change}" for change in changes),
            where=f"{file}, compared with start.json",
            fix=f"{RESTORE}, or undo these changes; for another recipe start a new run: nybble train -c {file} out=ANOTHER",
        )
