"""The quantised copy of a base in the cache: its path, its verification, and its comparison with a run's record."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Mapping

import bitsandbytes
import torch
from transformers import PreTrainedModel

from nybble.errors import ModelError
from nybble.files import cache as entries
from nybble.model.base import bits
from nybble.model.base.bits import TrainedBase
from nybble.model.base.files import saving_fault, weight_files
from nybble.plan.file_bytes import cached_copy_bytes
from nybble.run.start import MadeBy, QuantizedBase
from nybble.terminal import bytes_text


def copy_path(
    fingerprint: str, quantization: str, double_quantization: bool, dtype: torch.dtype, cache: pathlib.Path
) -> pathlib.Path:
    """The path of the quantised copy of a base; it exists if there was space for it."""
    parts = (fingerprint, quantization, double_quantization, str(dtype), bitsandbytes.__version__)
    return cache / "base" / hashlib.sha256(repr(parts).encode()).hexdigest()


def find_copy(folder: pathlib.Path) -> entries.Entry:
    """The copy, verified; `fault` says why it has to be made again.

    Raises:
        StorageError: as `entries.find`.
    """
    return entries.find(folder, lambda path, facts: bits.check(path, facts["tensors"]))


def bits_of(facts: entries.Facts) -> QuantizedBase:
    """The bits of a cached copy."""
    return _quantized_base(facts["tensors"], MadeBy.model_validate(facts["made"]))


def store(model: PreTrainedModel, folder: pathlib.Path, size: int, made: MadeBy) -> tuple[QuantizedBase, list[str]]:
    """Write a base that was quantised just now into the cache, read it back and verify it.

    Args:
        model: the base.
        folder: the path of the copy.
        size: its bytes.
        made: how it was quantised.

    Returns:
        Its bits, and a notice if it is not cached.
    """
    entries.make_folder(folder.parent)
    free = shutil.disk_usage(folder.parent).free
    if free < cached_copy_bytes(size):
        where = f"only {bytes_text(free, 1)} are free in {folder.parent}"
        notice = f"the quantised base ({bytes_text(size, 1)}) is not cached: {where}"
        return _quantized_base(bits.digests_of_model(model), made), [notice]
    try:
        with entries.new_entry(folder) as temporary:
            model.save_pretrained(temporary)
            if fault := saving_fault(model, temporary):
                raise entries.DamagedError(fault)
            tensors = bits.digests_of_files(temporary)
            apart = frozenset(file.name for file in weight_files(temporary))
            entries.seal(temporary, folder, {"tensors": tensors, "made": made.as_json()}, apart)
    except (entries.DamagedError, FileExistsError) as fault:
        return _quantized_base(bits.digests_of_model(model), made), [f"the quantised base is not cached: {fault}"]
    return _quantized_base(tensors, made), []


def _quantized_base(tensors: Mapping[str, str], made: MadeBy) -> QuantizedBase:
    return QuantizedBase(digest=bits.combined(tensors), made=made)


def check_unchanged(
    base: QuantizedBase, fingerprint: str, trained: TrainedBase | None, where: pathlib.Path
) -> list[str]:
    """Compare the bits of a base with those that a run was trained on.

    Args:
        base: the bits now.
        fingerprint: the base's fingerprint now.
        trained: the base in the run's record, if it has one.
        where: the folder that an error names.

    Returns:
        A notice where the bits differ and were made in another way.

    Raises:
        ModelError: the bits differ although they were made in the same way.
    """
    if trained is None or base.digest == trained.bits.digest:
        return []
    if base.made != trained.bits.made:
        return [
            f"the bits of the quantised base differ from those in training, where it was made with {trained.bits.made}; "
            f"this one was made with {base.made}: results may differ slightly"
        ]
    if trained.differs_from(fingerprint):
        raise ModelError(
            f"this is not the base that the run was trained on: {fingerprint} now, {trained.fingerprint} then",
            where=str(where),
            fix="--base FOLDER, with the base of the training",
        )
    raise ModelError(
        f"the quantised base is not the one that the run was trained on: its digest is {base.digest}, but was "
        f"{trained.bits.digest} in training, made in the same way ({base.made})",
        where=str(where),
        fix="the weights or this machine's memory may be damaged: download or copy the base again",
    )
