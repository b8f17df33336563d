"""The reference's likelihoods of all rows, computed once before the first step and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
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
            found = _read(entry.path / FILE)
            tell(console, f"reference {len(found):,} rows, from the cache")
            return found
    rows = _distinct(setup)
    with console.status("likelihoods under the reference") as status:

        def show(done: int) -> None:
            status.update(f"likelihoods under the reference: {done * group_size():,} of {len(rows):,} rows")

        own = computed_likelihoods(setup.model, collate, rows[rank() :: group_size()], setup.dtype, show)
    likelihoods = dict(all_gather(list(own.items())))
    if entry.facts is None:
        with contextlib.suppress(FileExistsError), entries.new_entry(entry.path) as temporary:
            _write(temporary / FILE, likelihoods)
            entries.seal(temporary, entry.path, {})
    tell(console, f"reference likelihoods of {len(likelihoods):,} rows computed")
    return likelihoods


def _name(setup: TrainingSetup) -> str:
    """A digest of everything that decides the likelihoods: rows, base, adapter, and how they are computed."""
    recipe = setup.recipe
    adapter = (
        [digest(file) for file in sorted(pathlib.Path(recipe.adapter).glob("adapter_*"))] if recipe.adapter else []
    )
    fused = setup.fusion is not None and not setup.fusion.fallen_back
    parts = [
        *(setup.data.fingerprint, setup.base.fingerprint, setup.base.bits and setup.base.bits.digest),
        *(recipe.data.validation, str(setup.dtype), setup.device.type, fused, recipe.engine.compute, adapter),
        *(recipe.model.model_dump(exclude={"path", "revision", "device"}), sorted(versions().items())),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _distinct(setup: TrainingSetup) -> list[dict[str, Any]]:
    """Every row once, the longest first, however rows are weighted and packed."""
    data = setup.data
    train = data.sample.samples if isinstance(data.sample, PackedRows) else data.sample
    found: dict[bytes, dict[str, Any]] = {}
    for rows in (train, data.validation):
        for row in rows if rows is not None else ():
            found[row_key(row)] = row
    return sorted(found.values(), key=lambda row: -row["length"])


def computed_likelihoods(
    model: torch.nn.Module,
    collate: JudgedCollator,
    rows: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    show: Callable[[int], None] = lambda _: None,
) -> dict[bytes, list[float]]:
    """The likelihoods of rows under a model as it is; each process has its own rows, and all call this together.

    Args:
        model: not wrapped by DistributedDataParallel.
        collate: makes batches of rows.
        rows: the longest first.
        dtype: the compute type.
        show: called with the number of rows done.
    """
    device = next(model.parameters()).device
    found: dict[bytes, list[float]] = {}
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    was_training = model.training
    model.eval()
    with uneven_passes(model), torch.no_grad(), precision:
        for members in batches([row["length"] for row in rows], MEASURED_TOKENS):
            batch = collate([rows[member] for member in members])
            moved = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
            sums = answer_likelihoods(model, moved)[:-1].reshape(-1, len(members)).T.tolist()
            found.update(zip((row_key(rows[member]) for member in members), sums, strict=True))
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
