"""The quantised copy of a base in the cache: where it is, how it is verified, and how it compares with a run's record."""

from __future__ import annotations

import hashlib
import pathlib
import shutil

import bitsandbytes
import torch
from transformers import PreTrainedModel

from nybble.errors import ModelError
from nybble.files import cache as entries
from nybble.model.base import bits
from nybble.model.base.bits import Bits, Trained
from nybble.model.base.files import differs, weight_files
from nybble.plan.ledger import cached_copy_bytes
from nybble.terminal import bytes_text


def copy_path(
    mark: str, quantization: str, double_quantization: bool, dtype: torch.dtype, cache: pathlib.Path
) -> pathlib.Path:
    """The path of the quantised copy of a base with that fingerprint; it exists if there was space for it."""
    parts = (mark, quantization, double_quantization, str(dtype), bitsandbytes.__version__)
    return cache / "base" / hashlib.sha256(repr(parts).encode()).hexdigest()


def find_copy(folder: pathlib.Path) -> entries.Entry:
    """The copy, verified; `fault` says what was wrong with one that has to be made again.

    Raises:
        StorageError: as `entries.find`.
    """
    return entries.find(folder, lambda path, facts: bits.check(path, facts["tensors"]))


def bits_of(facts: entries.Facts) -> Bits:
    """The bits of a cached copy."""
    return Bits(bits.combined(facts["tensors"]), facts["made"])


def store(model: PreTrainedModel, folder: pathlib.Path, size: int, made: dict[str, str]) -> tuple[Bits, list[str]]:
    """Write a base that was quantised just now into the cache, read back and verified; a notice if it is not cached.

    Args:
        model: the base.
        folder: where to.
        size: its bytes.
        made: how it was quantised.
    """
    entries.make_folder(folder.parent)
    free = shutil.disk_usage(folder.parent).free
    if free < cached_copy_bytes(size):
        where = f"only {bytes_text(free, 1)} are free in {folder.parent}"
        notice = f"the quantised base ({bytes_text(size, 1)}) is not cached: {where}"
        return Bits(bits.combined(bits.of_model(model)), made), [notice]
    try:
        with entries.new_entry(folder) as temporary:
            model.save_pretrained(temporary)
            if fault := differs(model, temporary):
                raise entries.DamagedError(fault)
            tensors = bits.of_files(temporary)
            apart = frozenset(file.name for file in weight_files(temporary))
            entries.seal(temporary, folder, {"tensors": tensors, "made": made}, apart)
    except (entries.DamagedError, FileExistsError) as fault:
        return Bits(bits.combined(bits.of_model(model)), made), [f"the quantised base is not cached: {fault}"]
    return Bits(bits.combined(tensors), made), []


def check_unchanged(now: Bits, mark: str, then: Trained | None, where: pathlib.Path) -> list[str]:
    """Compare the bits of a base with those that a run was trained on; a notice where they were made in another way.

    Raises:
        ModelError: made in the same way, they differ.
    """
    if then is None or now.digest == then.bits.digest:
        return []
    if now.made != then.bits.made:
        return [
            f"the bits of the quantised base differ from those in training, where it was made with {then.bits.made_by()}; "
            f"this one was made with {now.made_by()}: results may differ slightly"
        ]
    if then.is_another(mark):
        raise ModelError(
            f"this is not the base that the run was trained on: {mark} now, {then.fingerprint} then",
            where=str(where),
            fix="--base FOLDER, with the base of the training",
        )
    raise ModelError(
        f"the quantised base is not the one that the run was trained on: its digest is {now.digest}, but was "
        f"{then.bits.digest} in training, made in the same way ({now.made_by()})",
        where=str(where),
        fix="the weights or this machine's memory may be damaged: download or copy the base again",
    )
