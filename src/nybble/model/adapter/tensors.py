"""The tensors of an adapter's file, which must be finite floating-point numbers."""

from __future__ import annotations

import pathlib

import torch

from nybble.errors import ModelError
from nybble.model.base.files import FLOATS, check_whole, open_tensors, refuse_pointers
from nybble.terminal import first_of

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names; if both exist, PEFT and nybble use the first."""
AGAIN = "copy the adapter again"


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The file with an adapter's tensors.

    Raises:
        ModelError: there is none, it is not a file, or it is empty.
    """
    files = [folder / name for name in WEIGHTS]
    file = next((file for file in files if file.exists() or file.is_symlink()), None)
    if file is None:
        raise ModelError(f"there are no adapter weights in {folder} (no {WEIGHTS[0]})", fix=f"ls {folder}")
    refuse_pointers([file])
    if not file.stat().st_size:
        raise ModelError(f"{file.name} is empty", where=str(file), fix=AGAIN)
    return file


def read_tensors(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, torch.Tensor]]:
    """An adapter's file and its tensors by name, on the CPU, mapped from the file.

    Raises:
        ModelError: naming the file, or the first tensor that an adapter cannot have.
    """
    file = weights_file(folder)
    check_whole(file)
    names, get = open_tensors(file)
    tensors = {name: get(name) for name in names}
    if not tensors:
        raise ModelError(f"{file.name} contains no tensors", where=str(file), fix=AGAIN)
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in FLOATS:
            raise ModelError(
                f"{name} contains {kind} numbers; an adapter's are float32, bfloat16, float16 or float64",
                where=str(file),
                fix=AGAIN,
            )
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise ModelError(
            f"{first_of(broken)} contains NaN or infinity: training diverged, or the file is damaged",
            where=str(file),
            fix="train again with a lower learning rate, or copy the adapter again",
        )
    return file, tensors
