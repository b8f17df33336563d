"""The reference's likelihoods of all rows, computed once before the first step and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from datasets import Dataset
from rich.console import Console

from nybble.data.batches import PackedRows
from nybble.data.judged_batches import JudgedCollator, Likelihoods, row_key
from nybble.data.order import batches
from nybble.distributed.group import all_gather, group_size
from nybble.distributed.heartbeat import beat
from nybble.distributed.launcher import rank
from nybble.engine.fusion import uneven_passes
from nybble.files import cache as entries
from nybble.files.digests import digest
from nybble.objective.likelihood import MEASURED_TOKENS, answer_likelihoods
from nybble.run.versions import versions
from nybble.terminal import tell
from nybble.training.preparation import TrainingSetup

FILE = "likelihoods.npz"
KEY_BYTES = 16


def kept_reference(setup: TrainingSetup, collate: JudgedCollator, console: Console) -> Likelihoods:
    """The likelihoods of all training and validation rows under the model as it is before the first step.

    That is the base, or the base with the adapter that the run continues. A resumed run finds them in the cache, or computes
    them again: its checkpoint must not have been loaded yet. All processes call this together.

    Args:
        setup: with the model as it starts.
        collate: makes batches of rows.
        console: where progress is shown.

    Raises:
        StorageError: the cache cannot be used.
    """
    folder = setup.cache / "reference" / _name(setup)
    entry = entries.find(folder)
    if all(all_gather([entry.facts is not None])):
        with contextlib.suppress(FileNotFoundError):
            cached = _read(entry.path / FILE)
            tell(console, f"reference {len(cached):,} rows, from the cache")
            return cached
    collate = replace(collate, mismatched=False)
    likelihoods: dict[bytes, list[float]] = {}
    for what, rows in (("validation", setup.data.validation), ("training", _samples(setup.data.sample))):
        if rows is not None:
            likelihoods |= _of_all_processes(setup, collate, what, _Distinct.of(rows), console)
    if entry.facts is None:
        with contextlib.suppress(FileExistsError), entries.new_entry(entry.path) as temporary:
            _write(temporary / FILE, likelihoods)
            entries.seal(temporary, entry.path, {})
    tell(console, f"reference likelihoods of {len(likelihoods):,} rows computed")
    return likelihoods


def _of_all_processes(
    setup: TrainingSetup, collate: JudgedCollator, what: str, rows: _Distinct, console: Console
) -> dict[bytes, list[float]]:
    """The likelihoods of rows, of which each process computes its share."""
    own = rows.share(rank(), group_size())
    in_fp8 = what == "training" and setup.fusion is not None and setup.fusion.fp8 is not None
    with console.status("likelihoods under the reference") as status:

        def show(done: int) -> None:
            status.update(f"likelihoods under the reference: {done * group_size():,} of {len(rows):,} {what} rows")

        found = computed_likelihoods(setup.model, collate, own, own.lengths, setup.dtype, show, as_trained=in_fp8)
    return dict(all_gather(list(found.items())))


def _samples(rows: Dataset | PackedRows) -> Dataset:
    return rows.samples if isinstance(rows, PackedRows) else rows


def _name(setup: TrainingSetup) -> str:
    """A digest of everything that decides the likelihoods: rows, base, adapter, and how they are computed."""
    recipe = setup.recipe
    adapter = (
        [digest(file) for file in sorted(pathlib.Path(recipe.adapter).glob("adapter_*"))] if recipe.adapter else []
    )
    fused = setup.fusion is not None and not setup.fusion.fallen_back
    parts = [
        *(setup.data.fingerprint, setup.base.fingerprint, setup.base.bits and setup.base.bits.digest),
        *(recipe.data.path, recipe.train.seed),  # a weight below 1 leaves out rows, by the seed
        *(recipe.data.validation, str(setup.dtype), setup.device.type, fused, adapter),
        *(recipe.engine.compute, recipe.engine.fp8_skip, recipe.engine.fp8_fast),
        *(recipe.model.model_dump(exclude={"path", "revision", "device"}), sorted(versions().items())),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Distinct:
    """Every row once, however rows are weighted, the longest first; read when needed."""

    rows: Dataset
    places: Sequence[int]
    """The position of each row."""
    lengths: Sequence[int]

    @classmethod
    def of(cls, rows: Dataset) -> _Distinct:
        """The distinct ones of these rows."""
        found: dict[bytes, tuple[int, int]] = {}
        for position, row in enumerate(rows):
            found.setdefault(row_key(row), (row["length"], position))
        ordered = sorted(found.values(), key=lambda each: -each[0])
        return cls(rows, [position for _, position in ordered], [length for length, _ in ordered])

    def share(self, first: int, count: int) -> _Distinct:
        """One of so many shares."""
        return replace(self, places=self.places[first::count], lengths=self.lengths[first::count])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.places[index]]


def computed_likelihoods(
    model: torch.nn.Module,
    collate: JudgedCollator,
    rows: Any,
    lengths: Sequence[int],
    dtype: torch.dtype,
    show: Callable[[int], None] = lambda _: None,
    *,
    as_trained: bool = False,
) -> dict[bytes, list[float]]:
    """The likelihoods of rows under a model as it is; each process has its own rows, and all call this together.

    Args:
        model: not wrapped by DistributedDataParallel.
        collate: makes batches of rows.
        rows: anything that gives a row by its position.
        lengths: of the rows, in tokens.
        dtype: the compute type.
        show: called with the number of rows done.
        as_trained: in training mode but for dropout: in fp8, where that is what the rows are trained in.
    """
    device = next(model.parameters()).device
    found: dict[bytes, list[float]] = {}
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    was_training = model.training
    model.train(as_trained)
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.eval()
    with uneven_passes(model), torch.no_grad(), precision:
        for members in batches(lengths, MEASURED_TOKENS):
            batch = collate(fetched := [rows[member] for member in members])
            moved = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
            sums = answer_likelihoods(model, moved)[:-1].reshape(-1, len(members)).T.tolist()
            found.update(zip(map(row_key, fetched), sums, strict=True))
            beat()
            show(len(found))
    model.train(was_training)
    return found


def _write(file: pathlib.Path, likelihoods: Likelihoods) -> None:
    keys = numpy.frombuffer(b"".join(likelihoods), numpy.uint8).reshape(-1, KEY_BYTES)
    numpy.savez(file, keys=keys, likelihoods=numpy.asarray(list(likelihoods.values()), numpy.float32))


def _read(file: pathlib.Path) -> Likelihoods:
    with numpy.load(file) as stored:
        return {key.tobytes(): own for key, own in zip(stored["keys"], stored["likelihoods"].tolist(), strict=True)}
